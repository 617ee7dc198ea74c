"""What is said where transformers is missing or too old."""

import sys
import types

import pytest

pytest.importorskip("transformers", minversion="5")

from fused_mos.hf.requirement import check_transformers


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (None, r"needs transformers 5 or newer, which cannot be imported .*pip install \"fused_mos\[hf\]\""),
        ("4.57.1", r"needs transformers 5 or newer, got 4\.57\.1; upgrade it by pip install --upgrade"),
    ],
)
def test_it_says_what_to_install(monkeypatch, module, message):
    fake = None
    if module is not None:
        fake = types.ModuleType("transformers")
        fake.__version__ = module
    monkeypatch.setitem(sys.modules, "transformers", fake)
    with pytest.raises(ImportError, match=message):
        check_transformers()
