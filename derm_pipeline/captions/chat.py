"""What a chat leaves in an answer that is no description: marks, politeness, refusals, advice to the reader."""

from __future__ import annotations

import re
import unicodedata

from derm_pipeline.captions.prompts import Prompt

_MARKS = re.compile(r"<\|[^|>]{0,40}\|>|</?s>|\[/?INST\]|<(?:image|pad|unk)>", re.IGNORECASE)
_ROLE = re.compile(r"^(?:\W*(?:assistant|answer|description|caption|response)\W*(?::|\n)\s*)+", re.IGNORECASE)
_POLITENESS = re.compile(
    r"^(?:sure|certainly|of course|okay|here is|here's)\b[^.:!\n]{0,80}[.:!]\s+(?:here(?: is|'s)[^.:\n]{0,80}:\s*)?",
    re.IGNORECASE,
)
_LIST_ITEM_END = re.compile(r"([\w)%])[ \t]*(?=\n\s*(?:[-*•]|\d+[.)])\s)")
"""Where an item of a list ends without a full stop; on one line the items would run into each other."""
_START_WITH = re.compile(r"^\W*start(?:ing)? with\s*", re.IGNORECASE)


def tidy(answer: str, prompt: Prompt) -> str:
    """The answer on one line without what a chat leaves in it, beginning with the class name where one was told.

    Dropped: marks of chat templates, the speaker's name, a polite introduction, emphasis and bullets, quotation marks
    around all of it or around the opening, "Start with", and advice or leave-taking at the end ("Please consult a
    dermatologist."). An answer whose first sentence does not name the label that was told gets the opening before it.
    """
    text = _MARKS.sub(" ", unicodedata.normalize("NFC", answer)).strip()
    text = _LIST_ITEM_END.sub(r"\1.", _POLITENESS.sub("", _ROLE.sub("", text)))
    text = re.sub(r"(?m)^\s*(?:[-*•#]+|\d+[.)])\s+", "", text)
    text = " ".join(re.sub(r"\*\*|__|`", "", text).split())
    text = _START_WITH.sub("", text)
    quoted = re.match(rf"""["'“‘]({re.escape(prompt.opening)})([.,]?)["'”’]([.,:]?)\s*""", text, re.IGNORECASE)
    if quoted:
        rest = text[quoted.end() :]
        joint = quoted[3] or quoted[2] or ("" if rest[:1].islower() else ".")
        text = f"{quoted[1]}{joint.replace(':', '.')} {rest}".strip()
    text = _without_last_words(text, prompt)
    if len(text) > 1 and text[0] in "\"'“" and text[-1] in "\"'”" and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    if prompt.label and text and prompt.label.lower() not in re.split(r"[.!?]\s", text)[0].lower():
        text = f"{prompt.opening}. {text}"
    return text


def not_a_description(text: str) -> str:
    """The words by which a captioner declines, speaks of itself or to its reader; "" where it does neither."""
    match = _REFUSAL.search(text)
    return match.group() if match else ""


def markup(text: str) -> str:
    """A web address, a tag, code or the name of a chat's speaker in a text; "" where there is none."""
    match = _MARKUP.search(text)
    return match.group().strip() if match else ""


_MARKUP = re.compile(r"https?://|\bwww\.|</?\w[^<>]{0,40}>|```|[{}]|\b(?:USER|HUMAN|ASSISTANT|SYSTEM):")
_EXPERT = r"(?:dermatologist|doctor|physician|health ?care|medical|professional|specialist|clinician)s?"
_REFUSAL = re.compile(
    r"(?<!type )(?<!types )(?<!stage )\bI(?:['’](?:m|ve|d|ll)|\s+(?:am|can|cannot|could|do|don['’]t|have|hope|see|"
    r"think|apologi[sz]e|must|will|would|was))\b|"
    r"\b(?:sorry|apologi[sz]e|apologies|unfortunately)\b|\bas an? (?:AI|artificial|(?:large )?language|assistant)\b|"
    r"\b(?:language model|AI (?:model|assistant|system))\b|"
    r"\b(?:unable|not able|impossible|not possible) to (?:\w+ ){0,2}?"
    r"(?:provide|view|see|interpret|assist|help|diagnose|determine|describe|identify|analy[sz]e|give|say|tell)\b|"
    r"\b(?:medical|professional|definitive|accurate|formal) (?:advice|diagnosis)\b|"
    r"\b(?:consult|visit|contact|seek|refer to|see (?:an?|your)|(?:evaluat|examin|assess|advi[sc])\w* (?:by|of|from))"
    rf"\b[^.!?]{{0,60}}\b{_EXPERT}\b|\b{_EXPERT}\b[^.!?]{{0,30}}\bbe consulted\b|"
    r"\b(?:biopsy|treatment|follow-up|evaluation) (?:is|may be|would be|should be|was) "
    r"(?:recommended|needed|required|advised|necessary|warranted)\b|"
    r"\b(?:you|your|you['’]re|you['’]ve)\b|\blet me know\b|\bfeel free\b|\bhappy to help\b|"
    r"\b(?:it is|it['’]s) (?:important|worth|essential|crucial|recommended|advisable) (?:to|that)\b|"
    r"\bplease (?:note|consult|see|seek|provide|upload|let|contact|remember)\b|"
    r"\b(?:note|disclaimer):|\beducational purposes\b",
    re.IGNORECASE,
)
"""Words that no description of an image holds."""
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)]*\s+")


_LEAST_WORDS = 8
"""Fewer words describe nothing."""


def _without_last_words(text: str, prompt: Prompt) -> str:
    """The text without the sentences at its end that advise the reader or take leave of him.

    A text that describes nothing before them stays as it is, to be refused for what it says.
    """
    sentences = _SENTENCE_END.split(text)
    kept = len(sentences)
    while kept and _REFUSAL.search(sentences[kept - 1]):
        kept -= 1
    described = " ".join(sentences[:kept])
    own = re.sub(re.escape(prompt.opening), " ", described, flags=re.IGNORECASE)
    return described if kept < len(sentences) and len(own.split()) >= _LEAST_WORDS else text
