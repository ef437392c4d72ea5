"""Times as text, from the integers that Arrow keeps: any unit, any year."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from functools import lru_cache
from zoneinfo import ZoneInfo

_DIGITS = {"s": 0, "ms": 3, "us": 6, "ns": 9}
_DAY = 86_400  # seconds
_CYCLE = 146_097  # days of 400 years, after which the calendar repeats, weekdays too
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_EPOCH_DAY = _EPOCH.toordinal()
_FIRST = int((datetime(2, 1, 1, tzinfo=UTC) - _EPOCH).total_seconds())
_LAST = int((datetime(2400, 1, 1, tzinfo=UTC) - _EPOCH).total_seconds())
_OFFSET = re.compile(r"([+-])(\d\d):?(\d\d)?")


def timestamp_text(value: int, unit: str, zone: tzinfo | None) -> str:
    """ISO 8601 of a time since 1970, in a zone with its offset.

    Args:
        value: In units; UTC if there is a zone.
        unit: `s`, `ms`, `us` or `ns`, for 0, 3, 6 or 9 decimal places.
        zone: None if the time has no zone.
    """
    seconds, fraction = _seconds(value, unit)
    offset = 0 if zone is None else _offset(seconds, zone)
    days, second = divmod(seconds + offset, _DAY)
    text = f"{date_text(days)}T{_clock(second)}{fraction}"
    return text if zone is None else text + _offset_text(offset)


def date_text(days: int) -> str:
    """ISO 8601 of a day, counted from 1970-01-01."""
    cycles, rest = divmod(days + _EPOCH_DAY - 1, _CYCLE)
    day = date.fromordinal(rest + 1)
    year = day.year + 400 * cycles
    text = f"{year:04d}" if 0 <= year <= 9999 else f"{year:+05d}"
    return f"{text}-{day.month:02d}-{day.day:02d}"


def clock_text(value: int, unit: str) -> str:
    """ISO 8601 of a time of day in units since midnight."""
    seconds, fraction = _seconds(value, unit)
    return _clock(seconds) + fraction


def seconds_text(value: int, unit: str) -> str:
    """A duration in seconds, exactly."""
    seconds, fraction = _seconds(abs(value), unit)
    return f"{'-' if value < 0 else ''}{seconds}{fraction}"


@lru_cache
def zone_named(name: str) -> tzinfo:
    """The zone with this name or offset (`+01:00`); UTC if this machine does not know it."""
    if found := _OFFSET.fullmatch(name):
        sign, hours, minutes = found.groups()
        offset = timedelta(hours=int(hours), minutes=int(minutes or 0))
        if offset < timedelta(days=1):
            return timezone(-offset if sign == "-" else offset)
    try:
        return UTC if name == "UTC" else ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        return UTC


def _clock(second: int) -> str:
    minute, second = divmod(second, 60)
    hour, minute = divmod(minute, 60)
    return f"{hour:02d}:{minute:02d}:{second:02d}"


def _seconds(value: int, unit: str) -> tuple[int, str]:
    """Whole seconds, and the decimal point and digits of the rest."""
    digits = _DIGITS[unit]
    seconds, rest = divmod(value, 10**digits)
    return seconds, f".{rest:0{digits}d}" if digits else ""


def _offset(seconds: int, zone: tzinfo) -> int:
    """Seconds that the zone is ahead of UTC, by an equivalent year in Python's range."""
    if zone is UTC:
        return 0
    if seconds >= _LAST:
        seconds = _LAST + (seconds - _LAST) % (_CYCLE * _DAY)
    moment = _EPOCH + timedelta(seconds=max(seconds, _FIRST))
    offset = moment.astimezone(zone).utcoffset()
    return 0 if offset is None else int(offset.total_seconds())


def _offset_text(offset: int) -> str:
    hours, rest = divmod(abs(offset), 3600)
    minutes, seconds = divmod(rest, 60)
    text = f"{'-' if offset < 0 else '+'}{hours:02d}:{minutes:02d}"
    return f"{text}:{seconds:02d}" if seconds else text
