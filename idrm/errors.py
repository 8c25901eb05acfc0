"""The error for everything that the person who started a run can put right."""


class InputError(ValueError):
    """Bad input from the user: one clear line that names what was wrong, where, and what was expected."""
