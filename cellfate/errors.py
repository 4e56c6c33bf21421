"""What can go wrong, in one place: bad input is an error, a doubtful result is a warning."""


class DataError(ValueError):
    """The input breaks the data contract; the message names the key, what was found and what to do."""


class CellfateWarning(UserWarning):
    """The answer stands, but something about it should be known."""
