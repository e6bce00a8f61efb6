"""From Majority to Minority's prompts: a learned token for each condition, a phrase for each skin tone.

"An image of pso-class on the skin of a very dark-skinned individual": the law of `janet-sw/skin-diff`
(arXiv 2406.18375) for its seven conditions and skin types 1, 2, 5 and 6, and what we make of the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from derm_pipeline.captions.known import Known, names_unknown, one_line
from derm_pipeline.captions.wording import condition_or_unnamed, with_article
from derm_pipeline.records import Diagnosis, SkinTone, SkinType

INITIALISER_WORD: Final = "skin"
"""The word from whose embedding every learned token starts."""

INVERSION_TEMPLATES: Final = (
    "a photo of a {}",
    "a rendering of a {}",
    "a cropped photo of the {}",
    "the photo of a {}",
    "a close-up photo of a {}",
    "a cropped photo of a {}",
    "a photo of the {}",
    "a photo of one {}",
    "a close-up photo of the {}",
    "a rendition of the {}",
    "a rendition of a {}",
)
"""What a learned token is learned in: those of diffusers' textual inversion that have no adjective."""

_TOKEN_LETTERS = 3
_TONES = {
    SkinType.I: "a very light-skinned",
    SkinType.II: "a light-skinned",
    SkinType.III: "a medium-skinned",
    SkinType.IV: "a medium-skinned",
    SkinType.V: "a dark-skinned",
    SkinType.VI: "a very dark-skinned",
}
"""Types 3 and 4 are not used there; one phrase for both, as for the coarse tones."""


def tone_phrase(tone: SkinType | SkinTone | int | str) -> str:
    """The skin in words, for a Fitzpatrick type (1 to 6) or a coarse tone: "a very dark-skinned".

    Raises:
        ValueError: it is neither.
    """
    if isinstance(tone, str):
        return f"a {SkinTone(tone)}-skinned"
    return _TONES[SkinType(tone)]


def skin_diff_token(label: str) -> str:
    """The learned token that stands for a condition: "psoriasis" -> "pso-class".

    The law is the first three letters and "-class". Where it gives two of our diagnoses the same token, the one that
    comes later in `Diagnosis` takes as many letters more as it needs (melanoma "mel-class", melanocytic nevus
    "mela-class"), so that no two diagnoses are learned as one, and the token does not depend on what else is learned.
    So does a label whose token would read as "nan-class" and its like.

    Args:
        label: A diagnosis (its code or its words) or any other condition in words.

    Raises:
        ValueError: the label has no letter, or says that it is not known.
    """
    token = _token(label)
    if token is None:
        raise ValueError(f"label {label!r} names no condition to make a token of")
    return token


def skin_diff_tokens(labels: Iterable[str]) -> dict[str, str]:
    """Token -> label for every label, in alphabetical order of the tokens: what textual inversion has to learn.

    Raises:
        ValueError: two labels that are not the same condition have the same token; the message names both.
    """
    tokens: dict[str, str] = {}
    for label in sorted(set(labels)):
        token = skin_diff_token(label)
        if _condition(tokens.get(token, label)) != _condition(label):
            raise ValueError(
                f"{tokens[token]!r} and {label!r} would both be learned as {token!r}; "
                "leave one out, or name both as one condition"
            )
        tokens.setdefault(token, label)
    return dict(sorted(tokens.items()))


def skin_diff_prompt(label: str, skin_type: SkinType | SkinTone | int | str | None = None) -> str:
    """The prompt for a condition on a skin: "An image of pso-class on the skin of a very dark-skinned individual".

    Args:
        label: A diagnosis (its code or its words) or any other condition in words.
        skin_type: Fitzpatrick type or coarse tone; without one its clause is left out.

    Raises:
        ValueError: the label names no condition, or the skin type is none.
    """
    return _prompt(skin_diff_token(label), skin_type)


def skin_diff_caption(image: Known) -> str:
    """The prompt for what is known of an image; "a skin lesion" stands where no condition is known to have a token."""
    token = _token(image.condition) if image.condition else None
    return _prompt(token or with_article(condition_or_unnamed(image)), image.skin_type or image.skin_tone)


def _prompt(what: str, tone: SkinType | SkinTone | int | str | None) -> str:
    return f"An image of {what}" + ("" if tone is None else f" on the skin of {tone_phrase(tone)} individual")


def _token(label: str) -> str | None:
    words = _condition(label)
    if words in _DIAGNOSIS_TOKENS:
        return _DIAGNOSIS_TOKENS[words]
    letters = _letters(words)
    tokens = (f"{letters[:length]}-class" for length in range(_TOKEN_LETTERS, max(_TOKEN_LETTERS, len(letters)) + 1))
    return next((token for token in tokens if letters and not names_unknown(token)), None)


def _condition(label: str) -> str:
    """The label in lower case, or the words of the diagnosis whose code it is."""
    words = one_line(label).lower()
    return _PHRASES.get(words, words)


def _letters(words: str) -> str:
    return "".join(letter for letter in words if letter.isalpha())


def _diagnosis_tokens() -> dict[str, str]:
    """The token of every diagnosis, by its words."""
    tokens: dict[str, str] = {}
    for diagnosis in Diagnosis:
        letters = _letters(diagnosis.phrase.lower())
        prefixes = (letters[:length] for length in range(_TOKEN_LETTERS, len(letters) + 1))
        taken = set(tokens.values())
        # the last resort, a name that begins a former one: its code
        prefix = next((prefix for prefix in prefixes if f"{prefix}-class" not in taken), diagnosis.value)
        tokens[diagnosis.phrase.lower()] = f"{prefix}-class"
    return tokens


_PHRASES = {diagnosis.value: diagnosis.phrase.lower() for diagnosis in Diagnosis}
_DIAGNOSIS_TOKENS = _diagnosis_tokens()
