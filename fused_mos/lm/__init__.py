"""The AWD-LSTM language model with a Softmax, MoS or MoC head."""

from .awd_lstm import AWDLSTM, LMOutput
from .lstm import WeightDropLSTM
from .optim import NTASGD

__all__ = ["AWDLSTM", "LMOutput", "NTASGD", "WeightDropLSTM"]
