"""An open handle on a cache directory, with all that it can do."""

from .writing import Writing


class Store(Writing):
    """One open handle on a cache directory, with all layers."""


class DurableStore(Store):
    """The very same as another store, in all that it has, but for making durable what is done by it."""

    durable = True

    def __init__(self, store: Store) -> None:
        self.__dict__ = store.__dict__
        self.syncs_segments = True
