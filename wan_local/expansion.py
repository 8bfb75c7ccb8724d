"""Prompt expansion: a language model that sees both images writes more into the prompt, and what of it is accepted.

Takes the user's prompt and the two images; gives an `Expansion` whose `prompt` is the one to make the video from: the
model's, or the user's own where the answer is none, with the reason. The instructions and limits are in
`configs/expansion.toml`. Images are shown at up to 512 x 512; official: https://github.com/Wan-Video/Wan2.1.
"""

from __future__ import annotations

import re
import time
import unicodedata
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wan_local.expander import Expander
from wan_local.models.language_model import Chat, answer_tokens, end_tokens, load_chat_tokenizer, read_chat
from wan_local.request import Check, unchecked
from wan_local.settings import load_expansion_config
from wan_local.switch_config import ExpansionConfig

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase

_REPORT_TOKENS = 8  # a sign of progress each time so many are written
_PREFACE = re.compile(
    r"^(sure|certainly|okay|of course)?[,!.]?\s*"
    r"(here('s| is) [^:\n]{0,60}:|(the )?(expanded |video |final )?prompt:)\s*",
    re.IGNORECASE,
)
_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”|「([^」]+)」|『([^』]+)』')
_PAIRS = ('""', "“”", "''", "「」")
_IDEOGRAPH = r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
_LANGUAGES = re.compile(
    r"\b(chinese|japanese|korean|russian|arabic|hindi|greek|hebrew|thai|ukrainian)\b|中文", re.IGNORECASE
)
_FOREIGN_SHARE = 0.2  # of an answer's letters, where English was to be written
_LEAST_DISTINCT, _MOST_TRIGRAMS, _MOST_RUN = 0.35, 4, 8


@dataclass(frozen=True, slots=True)
class Expansion:
    """What the video is made from. `reason` says why it is the user's own prompt, None where it is the model's."""

    prompt: str
    model: str
    answer: str
    tokens: int
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return what the report and the video's metadata tell."""
        told = {"model": self.model, "tokens": self.tokens, "used": self.reason is None}
        return told if self.reason is None else {**told, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt as an expander reads it, and what its answer is read with: `ends` are the tokens that end it."""

    prompt: str
    model: str
    chat: Chat
    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int]


def ask(expander: Expander, prompt: str, pictures: Sequence[Image]) -> Question:
    """Return the question about `prompt`; none of the weights is read.

    pictures: start and end image, left out for a model that sees none. Raises CorruptModel, WrongModel.
    """
    config, folder = load_expansion_config(), expander.folder
    system = config.with_pictures if expander.sees_pictures else config.without_pictures
    chat = read_chat(folder, system, prompt, pictures if expander.sees_pictures else (), config)
    tokenizer = load_chat_tokenizer(folder)
    return Question(prompt, expander.name, chat, tokenizer, end_tokens(folder, tokenizer))


def expand(model: Any, question: Question, *, seed: int, check: Check = unchecked) -> Generator[int, None, Expansion]:
    """Yield the number of tokens written now and then, and return the expansion. A seed gives the same one again.

    check: called before each token.
    """
    config, parameter = load_expansion_config(), next(model.parameters())
    chat = question.chat.to(parameter.device, parameter.dtype)
    deadline = time.monotonic() + config.max_seconds
    written: list[int] = []
    late = False
    for token in answer_tokens(model, chat, config, seed=seed, ends=question.ends, check=check):
        written.append(token)
        if len(written) % _REPORT_TOKENS == 0:
            yield len(written)
        late = time.monotonic() > deadline
        if late:
            break
    text = str(question.tokenizer.decode(written, skip_special_tokens=True))
    answer = clean(text, ended=not late and len(written) < config.max_new_tokens)
    reason = f"it took longer than {config.max_seconds} s" if late else refusal_of(answer, question.prompt, config)
    return Expansion(question.prompt if reason else answer, question.model, answer, len(written), reason)


def clean(text: str, *, ended: bool = True) -> str:
    """Return an answer as one line without thoughts, headings, markup and quotation marks around it.

    ended: False cuts what the limit of tokens left half said back to its last full sentence.
    """
    if "<think>" in text or "</think>" in text:
        text = text.rpartition("</think>")[2] if "</think>" in text else ""
    text = re.sub(r"```\w*|\*\*|__|^#+ .*$", "", text, flags=re.MULTILINE).strip()
    text = re.sub(r"\s+", " ", _PREFACE.sub("", text)).strip()
    for pair in _PAIRS:
        if len(text) > 1 and text[0] == pair[0] and text[-1] == pair[1] and pair[0] not in text[1:-1]:
            text = text[1:-1].strip()
    if not ended:
        text = (re.search(r"^.*[.!?。！？](?=\s|$|[\"”」])[\"”」]?", text) or re.match("", text))[0]  # type: ignore[index]
    return text


def refusal_of(answer: str, prompt: str, config: ExpansionConfig) -> str | None:
    """Return why a cleaned answer is no expansion of `prompt`, in words for the log; None if it is one."""
    plain = _plain(answer)
    if not plain:
        return "the answer was empty"
    if plain.replace("’", "'").startswith(config.refusals):
        return f"the model refused ({answer[:60]!r})"
    if plain == _plain(prompt):
        return "the answer was the prompt itself"
    words, asked = num_words(answer), num_words(prompt)
    if words > config.max_words:
        return f"the answer was too long: {words:.0f} words, {config.max_words} are allowed"
    if words < min(asked, config.max_words // 4):
        return f"the answer was shorter than the prompt: {words:.0f} words for {asked:.0f}"
    return _garbled(plain) or _foreign(answer, prompt) or _lost_text(answer, prompt)


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()


def num_words(text: str) -> float:
    """Count words; two ideographs stand for one."""
    return len(re.findall(r"[^\W\d_]+|\d+", re.sub(_IDEOGRAPH, " ", text))) + len(re.findall(_IDEOGRAPH, text)) / 2


def _garbled(plain: str) -> str | None:
    """Tell whether a text says the same again and again, or is none."""
    if "\ufffd" in plain or re.search(rf"(\S)\1{{{_MOST_RUN},}}", plain):
        return "the answer was garbled"
    words = re.findall(rf"{_IDEOGRAPH}|[^\W_]+", plain)
    spoken = sum(map(len, words))
    if spoken < 0.6 * len(re.sub(r"\s", "", plain)):
        return "the answer was garbled"
    most = max(Counter(zip(words, words[1:], words[2:], strict=False)).values(), default=0)
    few = len(words) >= 40 and len(set(words)) < _LEAST_DISTINCT * len(words)
    return "the answer repeats itself" if most > _MOST_TRIGRAMS or few else None


def _foreign(answer: str, prompt: str) -> str | None:
    """Tell whether the answer is in another script than Latin, where the prompt neither is nor says otherwise."""
    if _LANGUAGES.search(prompt) or _foreign_share(prompt) > _FOREIGN_SHARE:
        return None
    unquoted = _QUOTED.sub(" ", answer)
    if _foreign_share(unquoted) > _FOREIGN_SHARE:
        return f"the answer was not in English ({answer[:30]!r})"
    return None


def _foreign_share(text: str) -> float:
    letters = [character for character in text if character.isalpha()]
    return sum("LATIN" not in unicodedata.name(letter, "") for letter in letters) / max(len(letters), 1)


def _lost_text(answer: str, prompt: str) -> str | None:
    """Tell which quoted text of the prompt, which is to be seen in the video, the answer left out."""
    quoted = [next(filter(None, found)) for found in _QUOTED.findall(prompt)]
    lost = next((text for text in quoted if _plain(text) not in _plain(answer)), None)
    return None if lost is None else f"the answer left out the quoted text {lost!r}"
