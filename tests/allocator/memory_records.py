"""A journal that is kept in memory."""


class Records:
    """A journal in memory that can die after so many records."""

    def __init__(self, records=(), most=None):
        self.records = list(records)
        self._most = most

    def append(self, record):
        if self._most is not None and len(self.records) >= self._most:
            raise KeyboardInterrupt
        self.records.append(dict(record))

    def of(self, kind):
        return [record for record in self.records if record["type"] == kind]
