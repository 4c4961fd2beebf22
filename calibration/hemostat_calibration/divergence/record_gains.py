"""The gains of several profiles on one record, each computed once."""

from __future__ import annotations

from hemostat_calibration.divergence.gain import Gain, gain
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.profiles.families import ADAPTER
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.records import TokenRecord


class RecordGains:
    """Computes a profile's gain on a validated record when it is first asked for, and keeps it.

    Measurement and the judge of profiles ask for the same ones.
    """

    def __init__(self, record: TokenRecord) -> None:
        self._record = record
        self._gains: dict[str, Gain] = {}

    def of(self, profile: CalibrationProfile) -> Gain:
        """Returns `gain(record, profile)`: nats [T], as an interval. Raises InvalidArgumentError if the record is of an
        adapter, or the profile is one: what a record's lists show of a change of the logits is about the model that
        they are of, and of a change of the weights they show nothing.
        """
        if self._record.adapter is not None or profile.family == ADAPTER:
            raise InvalidArgumentError("the gain of or with an adapter does not follow from a record's lists")
        if profile.version not in self._gains:
            self._gains[profile.version] = gain(self._record, profile)
        return self._gains[profile.version]
