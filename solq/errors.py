"""Short error messages, and the check of a number's lower bound."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; a message of one word, such as a missing key, gets the error's type.

    Errors of other libraries may have several lines or none, and this project reports an error in one line.
    """
    message = str(error).strip()
    return (message if " " in message else repr(error)).splitlines()[0]


def check_at_least(least: int, **numbers: int | None) -> None:
    """Raise a ValueError for the first number below `least`; None stands for a default and is accepted."""
    for name, number in numbers.items():
        if number is not None and number < least:
            raise ValueError(f"{name} is {number}, must be at least {least}")
