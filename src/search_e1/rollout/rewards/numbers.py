"""Rewards for numbers, with or without units. Units are compared, never converted: ``3 km`` is not ``3000 m``."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from search_e1.data.answers import exact_match
from search_e1.runs.nfc import nfc

TOLERANCE = 1e-6
_NUMBER = re.compile(r"(?<![\w.,])[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?![.,]?\d)")
_GLUED = re.compile(r"(?<![\w.,])([-+]?[\d.,]*\d)(?=(?!e[-+]?\d)[^\W\d_]|[%°])")
"""A number directly followed by its unit: ``3km``."""
_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
_SCALES = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "bn": 1e9, "trillion": 1e12}
_UNITS = {
    "km": "kilometer kilometers kilometre kilometres kms", "m": "meter meters metre metres", "cm": "centimeter centimeters "
    "centimetre centimetres", "mm": "millimeter millimeters millimetre millimetres", "mi": "mile miles", "ft": "foot feet",
    "in": "inch inches", "yd": "yard yards", "km²": "km2 sq_km square_km square_kilometer square_kilometers square_kilometre "
    "square_kilometres", "m²": "m2 sq_m square_meter square_meters square_metre square_metres", "mi²": "sq_mi square_mile "
    "square_miles", "kg": "kilogram kilograms kilo kilos", "g": "gram grams", "mg": "milligram milligrams",
    "t": "tonne tonnes metric_tons", "lb": "lbs", "oz": "ounce ounces", "l": "liter liters litre litres",
    "ml": "milliliter milliliters millilitre millilitres", "s": "sec secs second seconds", "min": "mins minute minutes",
    "h": "hr hrs hour hours", "day": "days", "week": "weeks", "month": "months", "year": "years yr yrs",
    "%": "percent per_cent pct", "$": "usd dollar dollars us_dollar us_dollars", "€": "eur euro euros", "£": "gbp",
    "km/h": "kph kmh kilometers_per_hour kilometres_per_hour", "mph": "miles_per_hour", "°c": "celsius degrees_celsius",
    "°f": "fahrenheit degrees_fahrenheit",
}  # fmt: skip
_SPELLINGS = {spelling.replace("_", " "): unit for unit, names in _UNITS.items() for spelling in (unit, *names.split())}
_MAX_UNIT_WORDS = max(spelling.count(" ") for spelling in _SPELLINGS) + 1
_NO_UNIT = frozenset(
    ("of", "and", "or", "the", "a", "an", "to", "at", "for", "by", "from", "long", "tall", "high", "wide", "deep", "old",
     "total", "about", "over", "under", "ago")
)  # fmt: skip


class Quantity(NamedTuple):
    value: float
    unit: str
    """The canonical spelling of a known unit, else the word after the number; "" without one."""


def numeric(answer: str | None, golds: Sequence[str]) -> float:
    """1.0 if ``answer`` and a gold answer have one number each, equal within 1e-6 (relative); else their exact match.

    Handles signs, thousands separators and exponents; ignores words and units around a number.
    """

    def equal(gold: str) -> float:
        number, wanted = _number(answer), _number(gold)
        if number is None or wanted is None:
            return exact_match(answer, [gold])
        return float(math.isclose(number, wanted, rel_tol=TOLERANCE))

    return max(map(equal, golds), default=0.0)


def number(answer: str | None, golds: Sequence[str], tolerance: float = TOLERANCE) -> float:
    """1.0 if ``answer`` and a gold answer have one number each, equal within ``tolerance`` (relative), without different units.

    A missing unit matches any unit. Texts with no number or several numbers are compared by exact match.
    """

    def equal(gold: str) -> float:
        own, wanted = quantity(answer or ""), quantity(gold)
        if own is None or wanted is None:
            return exact_match(answer, [gold])
        same = not (own.unit and wanted.unit) or own.unit == wanted.unit
        return float(same and math.isclose(own.value, wanted.value, rel_tol=tolerance))

    return max(map(equal, golds), default=0.0)


def quantity(text: str) -> Quantity | None:
    """The number in ``text`` and its unit, if there is exactly one number: digits, or a word up to twenty."""
    plain = _GLUED.sub(r"\1 ", nfc(text.lower().replace("\N{MINUS SIGN}", "-")))
    before, after = "", ""
    found = list(re.finditer(r"[-+]?[$€£]", plain))
    if len(found) == 1:  # a currency sign may precede the number
        sign = found[0][0]
        plain = f"{plain[: found[0].start()]}{sign[:-1]}{plain[found[0].end() :].lstrip()}"
        before = sign[-1]
    matches = list(_NUMBER.finditer(plain))
    if len(matches) == 1:
        value, after = float(matches[0][0].replace(",", "")), plain[matches[0].end() :]
    else:
        words = plain.split()
        numbers = [i for i, word in enumerate(words) if word.strip(".,") in _WORDS]
        if matches or len(numbers) != 1:
            return None
        value, after = float(_WORDS.index(words[numbers[0]].strip(".,"))), " ".join(words[numbers[0] + 1 :])
    rest = re.sub(r"[-\s]+", " ", after).split()
    while rest and rest[0].strip(".,") in _SCALES:
        value *= _SCALES[rest.pop(0).strip(".,")]
    return Quantity(value, before or _unit(rest))


def _unit(words: Sequence[str]) -> str:
    plain = [word.strip(".,;:!?()\"'") for word in words]
    for count in range(min(_MAX_UNIT_WORDS, len(plain)), 0, -1):
        if unit := _SPELLINGS.get(" ".join(plain[:count])):
            return unit
    return plain[0] if plain and plain[0] not in _NO_UNIT else ""


def _number(text: str | None) -> float | None:
    """The number in ``text``, if there is exactly one."""
    numbers = _NUMBER.findall(text or "")
    return float(numbers[0].replace(",", "")) if len(numbers) == 1 else None
