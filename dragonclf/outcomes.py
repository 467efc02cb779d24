"""How a command can end besides success, a wrong request (ValueError) and a failure of its surroundings (StorageError)."""


class BusyError(Exception):
    """Another driver is at work on the same output, or took it over."""


class RefusedError(Exception):
    """What was to be proven does not hold: nothing is changed."""


class BudgetSpentError(Exception):
    """The command has taken what it may. What is done stands; the same command goes on."""


class TooManyErrorsError(Exception):
    """A run is published, and more of its rows are errors than was allowed: it is not the one that readers get by default."""
