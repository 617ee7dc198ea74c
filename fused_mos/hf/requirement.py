"""Raises one clear error if transformers is missing or too old."""

OLDEST = 5


def check_transformers() -> None:
    """Raise ImportError unless transformers 5 or newer can be imported."""
    try:
        from transformers import __version__ as version
    except ImportError as error:
        raise ImportError(
            f"fused_mos.hf needs transformers {OLDEST} or newer, which cannot be imported ({error}); install it by "
            'pip install "fused_mos[hf]"'
        ) from error
    if int(version.split(".")[0]) < OLDEST:
        raise ImportError(
            f"fused_mos.hf needs transformers {OLDEST} or newer, got {version}; upgrade it by "
            'pip install --upgrade "fused_mos[hf]"'
        )
