"""The error tree keeps its promises to callers."""

import quintic.core as core


def test_user_errors_are_value_errors_and_carry_their_extra():
    for name in ("ConfigError", "DataError", "CheckpointError", "CodecError"):
        error = getattr(core, name)
        assert issubclass(error, core.UserError) and issubclass(error, ValueError)
        assert issubclass(error, core.QuinticError)
    error = core.MissingExtraError("transformers", "interop")
    assert isinstance(error, ImportError) and "quintic[interop]" in str(error)


def test_suggest():
    assert core.suggest("laptob", ["laptop", "tiny"]) == "; did you mean 'laptop'?"
    assert core.suggest("q", []) == ""
    assert core.suggest(0.1, ["laptop", "tiny"]) == "; expected one of: laptop, tiny"
