"""The text of HTML pages and Word documents."""

import io
import time
import zipfile

import pytest
from prepare_helpers import documents_of, prepare_here, write

from gpt.errors import InputError
from gpt.text import markup
from gpt.text.markup import text_of_html

W = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<p>a &amp; b<p>c<br>d", "a & b\n\nc\nd"),
        ("<h1>T</h1>\n<p>a\n  <b>b</b>c <i> d</i></p>", "T\n\na bc d"),
        ("<ul><li>a</li>\n<li>b</li></ul>", "a\nb"),
        ("<table><tr><td>a</td><td>b</td></tr>\n<tr><th>c<td>d</table>", "a b\nc d"),
        ('a<script>if (x < 1) { y("</p>") }</script>b<style>p {}</style>c', "abc"),
        ("<pre>  if x:\n      y\n</pre>z", "  if x:\n      y\n\n\nz"),
        ("a<br/>b<br><br>c<br><br><br><br>d", "a\nb\n\nc\n\nd"),
        ("a&nbsp;b &#233; &#x1F600; &unknown; &lt;p&gt;", "a\u00a0b é 😀 &unknown; <p>"),
        ("<!DOCTYPE html><html><head><title>T</title></head><body>a<!-- no --></body></html>", "T\na"),
        ("<div><div><p>a</p></div></div><div>b</div>", "a\n\nb"),
        ("a < b and c > d", "a < b and c > d"),
        ("", ""),
        ("plain", "plain"),
        ("</p></div>a</pre>", "a"),
        ("a</style>b</script></template>c", "abc"),
        ("a<noscript><p>Please enable JavaScript.</p></noscript>b", "a\n\nb"),
    ],
)
def test_tags_are_removed_and_blocks_become_lines(page, text):
    assert text_of_html(page).rstrip("\n") == text


def test_the_time_for_many_spaces_does_not_grow_with_their_square():
    spaces = " " * 60_000  # would take a minute
    began = time.process_time()
    assert text_of_html(f"<pre>a{spaces}b{spaces}\nc{spaces}</pre>").rstrip("\n") == f"a{spaces}b\nc"
    assert time.process_time() - began < 5


@pytest.mark.parametrize("name", ["x.html", "x.htm", "X.HTML"])
def test_a_page_is_a_document_without_tags(tmp_path, name):
    page = "<html><body><p>Grüße&hellip;</p>" + "<p>word</p>" * 20_000
    prepare_here(tmp_path / "out", write(tmp_path / name, page), val_fraction=0)
    assert documents_of(tmp_path / "out") == ["Grüße…" + "\n\nword" * 20_000]


def test_a_page_named_txt_keeps_its_tags(tmp_path):
    prepare_here(tmp_path / "out", write(tmp_path / "x.txt", "<p>a</p>"), val_fraction=0)
    assert documents_of(tmp_path / "out") == ["<p>a</p>"]


def test_bad_bytes_of_a_page_are_treated_as_those_of_a_text(tmp_path):
    source = write(tmp_path / "x.html", b"<p>a\xff</p>")
    with pytest.raises(InputError, match=r"x\.html: invalid UTF-8 at byte 4"):
        prepare_here(tmp_path / "out", source, encoding="utf-8")
    manifest = prepare_here(tmp_path / "out", source, encoding="utf-8", errors="replace", val_fraction=0)
    assert (documents_of(tmp_path / "out"), manifest["source"]["replaced"]) == (["a\ufffd"], 1)
    other = write(tmp_path / "y.html", "b")
    manifest = prepare_here(tmp_path / "out", source, other, encoding="utf-8", errors="skip", val_fraction=0)
    assert (documents_of(tmp_path / "out"), manifest["source"]["undecodable"]) == (["b"], 1)


def test_a_page_over_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("gpt.text.sources.HTML_LIMIT", 1000)
    with pytest.raises(InputError, match=r"x\.html: a page of more than 1,000 characters"):
        prepare_here(tmp_path / "out", write(tmp_path / "x.html", "word " * 500))


# ---- Word


def docx(body, **parts):
    """Returns the bytes of a Word document with this XML in its body."""
    data = io.BytesIO()
    types = "http://schemas.openxmlformats.org/package/2006/content-types"
    relations = "http://schemas.openxmlformats.org/package/2006/relationships"
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument"
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("[Content_Types].xml", f'<Types xmlns="{types}"/>')
        archive.writestr(
            "_rels/.rels",
            f'<Relationships xmlns="{relations}">'
            f'<Relationship Id="r" Type="{office}" Target="word/document.xml"/></Relationships>',
        )
        archive.writestr("word/document.xml", f"<w:document {W}><w:body>{body}</w:body></w:document>")
        for name, content in parts.items():
            archive.writestr(f"word/{name}.xml", content)
    return data.getvalue()


def paragraph(text):
    return f'<w:p><w:r><w:t xml:space="preserve">{text}</w:t></w:r></w:p>'


def test_a_word_document_is_its_paragraphs_tables_and_line_breaks(tmp_path):
    body = paragraph("Grüße &amp; so") + "<w:p><w:r><w:t>Roses</w:t><w:br/><w:t>Violets</w:t></w:r></w:p>"
    cell = "<w:tc>{}</w:tc>"
    body += f"<w:tbl><w:tr>{cell.format(paragraph('a'))}{cell.format(paragraph('b'))}</w:tr></w:tbl>"
    body += "<w:p><w:ins w:id='1'><w:r><w:t>kept</w:t></w:r></w:ins>"
    body += "<w:del><w:r><w:delText>gone</w:delText></w:r></w:del></w:p>"
    body += f"<w:sdt><w:sdtContent>{paragraph('in a control')}</w:sdtContent></w:sdt>"
    for name in ("x.docx", "x"):
        prepare_here(tmp_path / "out", write(tmp_path / name, docx(body)), val_fraction=0)
        assert documents_of(tmp_path / "out") == ["Grüße & so\n\nRoses\nViolets\n\na\n\nb\n\nkept\n\nin a control"]


def test_a_word_document_in_an_archive_is_read(tmp_path):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("sub/a.docx", docx(paragraph("a")))
        archive.writestr("sub/~$a.docx", b"the lock file of Word")
    prepare_here(tmp_path / "out", write(tmp_path / "x.zip", data.getvalue()), val_fraction=0)
    assert documents_of(tmp_path / "out") == ["a"]


def bomb():
    entities = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 12))
    document = f'<!DOCTYPE x [<!ENTITY e0 "{"x" * 100}">{entities}]><x>&e11;</x>'
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("word/document.xml", document)
    return data.getvalue()


@pytest.mark.parametrize(
    "bad", [docx("<w:p>"), docx(paragraph("a"))[:300], bomb(), docx("<w:p>" * 5000 + "</w:p>" * 5000)]
)
def test_a_damaged_word_document_is_refused(tmp_path, bad):
    with pytest.raises(InputError, match=r"x\.docx: damaged .*; (restore it|open it in Word and save it again)"):
        prepare_here(tmp_path / "out", write(tmp_path / "x.docx", bad))


def test_a_word_document_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(markup, "XML_LIMIT", 10_000)
    with pytest.raises(InputError, match=r"x\.docx: [\d,]+ bytes of XML, at most 10,000 are read; save it as \.txt"):
        prepare_here(tmp_path / "out", write(tmp_path / "x.docx", docx(paragraph("a" * 20_000))))
