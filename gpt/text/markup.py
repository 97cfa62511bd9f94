"""Text out of HTML pages and Word documents."""

import re
import zipfile
from html.parser import HTMLParser
from typing import IO

from gpt.errors import InputError
from gpt.text.containers import extra

HTML_LIMIT = 1 << 26  # characters of a page, which is parsed as a whole
XML_LIMIT = 1 << 25  # bytes of XML in a Word document; a novel of a million characters takes 6 MB
UNSEEN = frozenset({"script", "style", "template", "noscript"})  # elements whose content a reader does not see
PARAGRAPHS = re.compile("p|h[1-6]|blockquote|pre|table|[uod]l|section|article|header|footer|nav|main|aside|figure|form")
LINES = re.compile("div|li|tr|d[td]|hr|title|option|address|(fig)?caption|legend|fieldset|body")


class TextOfHtml(HTMLParser):
    """Collects the text that a reader of an HTML page sees. Block elements end a line, paragraphs leave an empty line
    before and after them; other white space becomes one space, except in <pre>."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.breaks = 0  # line breaks to write before the next text
        self.unseen = self.preformatted = 0  # open elements of these kinds

    def handle_starttag(self, tag: str, attributes: object) -> None:
        self.handle_startendtag(tag, attributes)
        self.unseen += tag in UNSEEN
        self.preformatted += tag == "pre"

    def handle_startendtag(self, tag: str, attributes: object) -> None:
        self.end_line(tag)
        self.breaks += tag == "br"
        if tag in ("td", "th"):
            self.handle_data(" ")

    def handle_endtag(self, tag: str) -> None:
        self.end_line(tag)
        self.unseen = max(0, self.unseen - (tag in UNSEEN))
        self.preformatted = max(0, self.preformatted - (tag == "pre"))

    def end_line(self, tag: str) -> None:
        self.breaks = max(self.breaks, 2 if PARAGRAPHS.fullmatch(tag) else LINES.fullmatch(tag) is not None)

    def handle_data(self, data: str) -> None:
        if self.unseen:
            return
        if not self.preformatted:
            data = re.sub(r"[ \t\r\n\f]+", " ", data)
            if self.breaks or not self.parts or self.parts[-1].endswith((" ", "\n")):
                data = data.removeprefix(" ")
        if data:
            if self.parts:
                self.parts.append("\n" * min(self.breaks, 2))
            self.parts.append(data)
            self.breaks = 0

    def text(self) -> str:
        return re.sub(r"(?<! ) +(?=\n|$)", "", "".join(self.parts))


def text_of_html(page: str) -> str:
    """Returns the text of an HTML page: text_of_html("<p>a &amp; b<p>c<br>d") == "a & b\\n\\nc\\nd"."""
    parser = TextOfHtml()
    parser.feed(page)
    parser.close()
    return parser.text()


def text_of_docx(name: str, file: IO[bytes]) -> str:
    """Returns the text of a Word document: its paragraphs, tables, text boxes and notes. Raises InputError if it is
    damaged or too large, or without mammoth."""
    mammoth = extra(name, "mammoth", "a Word document")
    with zipfile.ZipFile(file) as archive:
        size = sum(entry.file_size for entry in archive.infolist() if entry.filename.endswith((".xml", ".rels")))
    if size > XML_LIMIT:
        raise InputError(f"{name}: {size:,} bytes of XML, at most {XML_LIMIT:,} are read; save it as .txt")
    try:
        file.seek(0)
        return text_of_html(mammoth.convert_to_html(file, convert_image=lambda image: []).value)
    except MemoryError:
        raise
    except Exception as error:  # a document that is not as it should be fails anywhere in mammoth, with any error
        raise InputError(f"{name}: damaged Word document ({error}); open it in Word and save it again") from None
