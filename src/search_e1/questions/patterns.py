"""Patterns of the rules for English text."""

import re

_CAPITAL = r"[A-Z\u00c0-\u00de]"
_NAME_WORD = rf"(?:{_CAPITAL}\.(?:{_CAPITAL}\.)*|{_CAPITAL}[\w'\u2019-]*)"
NAME = rf"{_NAME_WORD}(?: (?:(?:of|the|de|del|van|von|di|da|le|la) )*{_NAME_WORD}){{0,5}}"

RELATIONS = {
    "directed by": ("Who directed {}?", "the director of {}"),
    "written by": ("Who wrote {}?", "the writer of {}"),
    "written and directed by": ("Who wrote and directed {}?", "the writer and director of {}"),
    "produced by": ("Who produced {}?", "the producer of {}"),
    "composed by": ("Who composed {}?", "the composer of {}"),
    "(?:performed|recorded|sung) by": ("Who recorded {}?", "the performer of {}"),
    "developed by": ("Who developed {}?", "the developer of {}"),
    "designed by": ("Who designed {}?", "the designer of {}"),
    "founded by": ("Who founded {}?", "the founder of {}"),
    "created by": ("Who created {}?", "the creator of {}"),
    "published by": ("Who published {}?", "the publisher of {}"),
    "owned by": ("Who owns {}?", "the owner of {}"),
    "(?:born|raised) in": ("Where was {} born?", "the birthplace of {}"),
    "located in": ("Where is {} located?", "the place where {} is located"),
    "headquartered in": ("Where is {} headquartered?", "the place where {} is headquartered"),
    "capital of": ("What is {} the capital of?", ""),
    "(?:son|daughter) of": ("Whose child is {}?", "the parent of {}"),
    "married to": ("Who is the spouse of {}?", "the spouse of {}"),
    "named after": ("Who or what is {} named after?", ""),
    "based on": ("What is {} based on?", ""),
}
"""Pattern before a name -> (question that the name answers, description of the name by the subject; empty if none)."""
DESCRIBING = re.compile(rf"\b(?:{'|'.join(phrase for phrase, (_, description) in RELATIONS.items() if description)}) $")

NOT_ITS_OWN = re.compile(
    r"\b(?:novels?|book|play|story|comic|song|poem|script|screenplay|sequel|adaptation|remake|who|whose|which|where|when|that"
    r"|while|after|before|based on|son|daughter|wife|husband|father|mother|brother|sister)\b(?!.*\b(?:is|was) (?:a|an|the)\b)"
)
"""Text before a relation after which the relation may belong to something else than the subject."""
PRONOUN = re.compile(
    r"(?:It|He|She|The (?:film|movie|book|novel|album|song|band|single|series|show|company|town|city|village|building|station"
    r"|school|university|river|game|magazine|episode|club|team|product|device|software))(?= )"
)
YEAR = re.compile(r"\b(?:1[0-9]|20)\d\d\b(?![,.]\d|\s?%)")
_MONTH = "January|February|March|April|May|June|July|August|September|October|November|December"
_DATE = rf"(?:\d{{1,2}} )?(?:(?:{_MONTH}) )?(?:\d{{1,2}}, )?"
BORN = re.compile(rf"\s*\([^()]*?\bborn (?:[A-Z][^()]*? )??{_DATE}(?P<born>(?:1[0-9]|20)\d\d)\b[^()]*\)")
LIFE = re.compile(
    rf" \((?:[^()\d]*[;,] )?{_DATE}(?P<born>(?:1[0-9]|20)\d\d)\s*[\u2013\u2014-]\s*{_DATE}(?P<died>(?:1[0-9]|20)\d\d)\)"
)
YEAR_OF = re.compile(
    rf"(?:\s*\([^()]*\))? (?P<be>was|were) (?:first |originally |officially )?(?P<verb>[a-z]+)"
    rf"(?P<by> (?:by|as|at|in|for) (?:the )?{NAME})?,? (?:in|on|in early|in late) {_DATE}(?P<year>(?:1[0-9]|20)\d\d)\b"
)
PARTICIPLE = re.compile(r"[a-z]+ed|born|built|founded|written|begun|made|shot|sold|won|held|set|laid|sunk|taken|given|known")
DEATH = re.compile(rf" died (?:(?:in|at) {NAME},? )?(?:on|in) {_DATE}(?P<year>(?:1[0-9]|20)\d\d)\b")
AMOUNT = re.compile(
    r"\b(?:(?:has|had|with) an? (?:total |estimated )?|[Tt]he |[Ii]ts )(?P<what>population|area|height|length|elevation"
    r"|capacity|depth|width|weight|price|budget|density|speed|range)"
    r"(?: of|(?: in \d{4})? (?P<be>is|was)) (?:about |approximately |around |over |roughly )?"
    r"(?P<amount>[$\u20ac\u00a3]?\d+(?:,\d{3})*(?:\.\d+)?(?: (?:million|billion|people|inhabitants|residents|kilomet\w+|km2?"
    r"|miles?|feet|ft|met(?:re|er)s?|m|hectares?|acres|kg|tons?|tonnes|mm|cm|%))?)(?![,.]?\d)(?=[\s.,;)]|$)"
)
DEFINITION = re.compile(
    r"(?:\s*\([^()]*\))* (?P<be>is|was) (?:an?|the) (?P<what>[^,.;()]{3,60}?) "
    r"(?:(?P<link>that|which|who) )?(?P<rest>(?:directed|written|produced|composed|developed|designed|founded|created|published"
    r"|owned|located|based|situated|released|recorded|built|established|played|served|starred|won|was|has|had|stars"
    r"|runs|flows|formed|headquartered|established|known|set|used|named)\b.{12,160})$"
)
KEY_VALUE = re.compile(r"\s*(?:[-*\u2022] )?(?P<key>\*{0,2}[A-Z][\w /-]{1,40}\*{0,2}) ?:[ \t]+(?P<value>\S.{0,80})")
"""A space follows the colon, so that addresses and times of day are none."""
NEW_LINE_OF_ITS_OWN = re.compile(r"\s*(?:$|[-*+\u2022#|>`~]|\d+[.)] )")
"""The beginning of a line that does not continue the one before."""
TABLE_RULE = re.compile(r"\|?[\s:|-]*-{2,}[\s:|-]*\|?")
ABBREVIATION = re.compile(
    r"(?:\b(?:[A-Z]|Mr|Mrs|Ms|Dr|St|Jr|Sr|Inc|Ltd|Co|No|vs|etc|e\.g|i\.e|c|ca|approx|Lt|Col|Gen|Prof))\.$"
)
