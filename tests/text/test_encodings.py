"""The encoding of a file by its bytes; line breaks and documents in a text that comes in pieces."""

import codecs
import io
import itertools
import random
import re
import struct
import sys
import time

import pytest

from gpt.text.encodings import encoding_of, guess, split_texts, with_line_breaks

ENGLISH = "The cat sat on the mat and then it rained in. Nothing more to see on that hot street of stone.\n"
TEXTS = {
    "English": "“Curly” – naïve café… it’s fine, he said — and left.\n",
    "French": "Le café était fermé; à côté, l’hôtel « Étoile » reçoit les élèves dès l’été. Où est mon frère aîné?\n",
    "German": "Über die Brücke gehen, größer als früher: „Süße Grüße aus Österreich“, sagte er. Straße, Äpfel.\n",
    "Spanish": "¿Dónde está el niño? Mañana será otro día, dijo la señora con pasión y corazón.\n",
    "Polish": "Zażółć gęślą jaźń. Łódź, Kraków, święto, źródło, ćma, być może jutro będzie padać śnieg.\n",
    "Czech": "Příliš žluťoučký kůň úpěl ďábelské ódy. Děkuji, že jste přišli včera večer.\n",
    "Russian": "Все люди рождаются свободными и равными в своём достоинстве и правах. Они наделены разумом.\n",
    "Greek": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.\n",
    "Turkish": "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. Akıl ve vicdana sahiptirler.\n",
    "Hebrew": "כל בני אדם נולדו בני חורין ושווים בערכם ובזכויותיהם. כולם חוננו בתבונה ובמצפון.\n",
    "Arabic": "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق. وقد وهبوا عقلا وضميرا.\n",
    "Thai": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ ต่างมีเหตุผลและมโนธรรม\n",
    "Hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।\n",
    "Chinese": "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。人人生而自由，在尊严和权利上一律平等。\n",
    "Taiwanese": "人人生而自由，在尊嚴和權利上一律平等。他們賦有理性和良心，並應以兄弟關係的精神相對待。\n",
    "Japanese": "吾輩は猫である。名前はまだ無い。すべての人間は、生れながらにして自由であり、平等である。\n",
    "Korean": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 인간은 이성을 부여받았다.\n",
}
LEGACY = [
    ("English", "cp1252"),
    ("French", "cp1252"),
    ("German", "cp1252"),
    ("Spanish", "latin-1"),
    ("Polish", "cp1250"),
    ("Polish", "iso8859-2"),
    ("Czech", "cp1250"),
    ("Russian", "cp1251"),
    ("Russian", "koi8-r"),
    ("Greek", "cp1253"),
    ("Turkish", "cp1254"),
    ("Hebrew", "cp1255"),
    ("Arabic", "cp1256"),
    ("Thai", "cp874"),
    ("Chinese", "gb18030"),
    ("Taiwanese", "big5"),
    ("Japanese", "shift_jis"),
    ("Japanese", "euc_jp"),
    ("Korean", "euc_kr"),
]


def found(data):
    """Returns the encoding of `data`, and checks that the file is at its start again."""
    file = io.BytesIO(data)
    encoding = encoding_of(file)
    assert file.tell() == 0
    return encoding


# ---- UTF-8


@pytest.mark.parametrize("text", ["", "a", ENGLISH, *TEXTS.values(), "\ufeffa", "\n\0 é", "x" * 70_000 + "é" * 70_000])
def test_valid_utf8_is_utf8(text):
    assert found(text.encode()) == "utf-8"


@pytest.mark.parametrize("language", TEXTS)
@pytest.mark.parametrize("bad", [b"\xff", b"\xe9 ", "é".encode("utf-16-le") + b"\x80"])
def test_fault_001_utf8_with_a_bad_byte_is_utf8(language, bad):
    data = TEXTS[language].encode() * 3
    for place in (0, len(data)):
        assert found(data[:place] + bad + data[place:]) == "utf-8"


def test_fault_001_a_bad_byte_after_much_valid_utf8_is_no_other_encoding():
    assert found(TEXTS["Chinese"].encode() * 2000 + b"\xff") == "utf-8"


@pytest.mark.parametrize("data", [b"\xff", b"abc\xff", b"ab\xe2\x82", b'{"text": "a"}\n{"text": "\xff"}\n'])
def test_fault_001_too_few_bytes_for_a_guess_are_utf8(data):
    assert found(data) == "utf-8"


def test_random_bytes_are_no_text_of_any_encoding():
    for seed in range(20):
        assert found(random.Random(seed).randbytes(5000)) == "utf-8"


# ---- other encodings


@pytest.mark.parametrize("language, encoding", LEGACY, ids=str)
@pytest.mark.parametrize("times", [1, 40])
@pytest.mark.parametrize("around", [0, 60, 2000])
def test_the_usual_encodings_are_guessed_also_among_many_english_lines(language, encoding, times, around):
    text = ENGLISH * around + TEXTS[language] * times + ENGLISH * around
    data = text.encode(encoding, "ignore")
    assert data.decode(found(data)) == data.decode(encoding)


@pytest.mark.parametrize(
    "line",
    [
        "“Don’t,” she said. “I can’t — it’s too late…”",
        "The price is £5 or €6.",
        "naïve café, résumé",
        "• item one",
        "© 2024 Foo™ — all rights reserved®",
        "25°C – 30°C, ½ cup, 5×5",
        "it’s fine",
        "São Paulo não é a capital; ações e corações.",
        "Jag är från Göteborg och åker tåg på måndag, förstås.",
        "Perché è così? Città, università e libertà: già.",
        "Eén coöperatie, geïnteresseerd in België.",
        "Hyvää päivää, mitä kuuluu? Yö oli kylmä.",
    ],
)
@pytest.mark.parametrize("times", [1, 20])
def test_western_text_is_not_taken_for_another(line, times):
    text = f"{line}\n" * times
    assert text.encode("cp1252").decode(found(text.encode("cp1252"))) == text


@pytest.mark.parametrize("line", ["café", "é", "café – “x”", "£5", "“Hello,” he said."])
def test_one_short_line_among_many_is_guessed_with_them(line):
    data = ENGLISH.encode() * 30 + line.encode("cp1252") + b"\n" + ENGLISH.encode() * 30
    assert data.decode(found(data)) == data.decode("cp1252")


def test_without_the_detector_the_file_counts_as_utf8(monkeypatch):
    monkeypatch.setitem(sys.modules, "chardet", None)
    assert guess(TEXTS["French"].encode("cp1252")) == "utf-8"


@pytest.mark.parametrize("ending", ["\n", "\r", "\r\n"])
def test_the_time_for_long_lines_does_not_grow_with_their_square(ending):
    lines = ["plain " * 10_000, "é", "naïve " * 10_000, "plain"]  # the first would take half a minute
    began = time.process_time()
    assert found(ending.join(lines).encode()) == "utf-8"
    assert found(ending.join(lines).encode("cp1252")) == "cp1252"
    assert time.process_time() - began < 10


# ---- UTF-16


@pytest.mark.parametrize("language", TEXTS)
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_fault_005_utf16_without_a_mark_is_recognised(language, encoding):
    for text in (TEXTS[language] * 20, ENGLISH * 5 + TEXTS[language] * 5, TEXTS[language] * 2000):
        assert found(text.encode(encoding)) == encoding


@pytest.mark.parametrize("text", ["hi", "wide é", "a\n", ENGLISH, '{"text": "x"}\r\n'])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_fault_005_short_latin_texts_in_utf16_are_recognised(text, encoding):
    assert found(text.encode(encoding)) == encoding


@pytest.mark.parametrize("mark", [codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE])
def test_fault_005_a_byte_order_mark_decides(mark):
    name = {2: "utf-16", 4: "utf-32"}[len(mark)]
    order = "-le" if mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF32_LE) else "-be"
    for text in ("", "é", TEXTS["Chinese"]):
        data = mark + text.encode(name + order)
        assert found(data) == name
        assert data.decode(name) == text


@pytest.mark.parametrize(
    "data",
    [
        b"second\r\n\0 \xc3\xa9",
        b"".join(b"/usr/share/doc/%d\0" % n for n in range(2000)),  # find -print0
        b"".join(word.encode() + b"\0" for word in (ENGLISH * 20).split()),
        TEXTS["Chinese"].encode() * 50 + b"\0" * 100,
        b"\0" * 5000,
        ENGLISH.encode() * 5 + b"\x1b[2J\x07\x08" * 50,
        ENGLISH.encode("utf-32-le") * 5,
    ],
)
def test_fault_005_other_text_with_nuls_is_not_utf16(data):
    assert found(data) == "utf-8"


def test_fault_005_numbers_of_16_bits_are_not_utf16():
    numbers = [random.Random(1).randrange(50257) for _ in range(5000)]
    assert found(struct.pack("<5000H", *numbers)) == "utf-8"


# ---- text in pieces


def cuts(text, seed):
    """Returns `text` in parts of random lengths, some of which are empty."""
    rng = random.Random(seed)
    places = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(len(text) + 2)))
    return [text[a:b] for a, b in itertools.pairwise([0, *places, len(text)])]


@pytest.mark.parametrize("text", ["", "a\r\nb\rc\nd\r\r\n\n\r", "\r", "\r\n", "\r\r\r", "ab\r\n\r\ncd\n\r"])
def test_fault_005_line_breaks_are_those_of_python_wherever_the_text_is_cut(text):
    expected = io.StringIO(text, newline=None).read()
    for seed in range(100):
        assert "".join(with_line_breaks(cuts(text, seed))) == expected


@pytest.mark.parametrize("separator", ["\n", "<|endoftext|>", "\n\n", "--", "a", "aba", "=\n="])
def test_split_texts_gives_the_documents_of_a_plain_split_wherever_the_text_is_cut(separator):
    rng = random.Random(0)
    for seed in range(300):
        letters = [separator, separator[:-1], separator[1:], "a", "b", "\n", " ", "\r\n"]
        text = "".join(rng.choices(letters, k=rng.randrange(12)))
        pattern = re.escape(separator) + ("" if separator == "\n" else r"(?:\r?\n)?")
        expected = [part for part in re.split(pattern, text) if part.strip()]
        documents = {}
        for number, part in split_texts(cuts(text, seed), separator):
            documents[number] = documents.get(number, "") + part
        assert list(documents) == sorted(documents)
        assert [part for part in documents.values() if part.strip()] == expected


def test_without_a_separator_the_text_is_one_document():
    assert list(split_texts(["a\n", "", "b"], "")) == [(0, "a\n"), (0, ""), (0, "b")]


def test_a_long_document_between_separators_comes_in_parts():
    parts = list(split_texts(["a" * 1000] * 5 + ["--b"], "--"))
    assert max(len(text) for _, text in parts) < 2000
    assert {number for number, _ in parts} == {0, 1}
