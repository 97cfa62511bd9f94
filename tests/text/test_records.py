"""Records of CSV, JSON, JSONL and Parquet, against the csv and json modules and pyarrow; the field with the text."""

import csv
import io
import itertools
import json
import random
import tracemalloc

import pyarrow
import pytest
from prepare_helpers import documents_of, jsonl, prepare_here, rows, write
from pyarrow import parquet

from gpt.errors import InputError
from gpt.text import records
from gpt.text.records import choose_field, csv_records, delimiter_of, json_records, lines_of


def csv_of(*table, **options):
    text = io.StringIO()
    csv.writer(text, **options).writerows(table)
    return text.getvalue()


def cut(text, size):
    return [text[start : start + size] for start in range(0, len(text), size)]


def random_cell(generator):
    return "".join(
        generator.choice(["a", "é", ",", ";", '"', "\n", "\r\n", "\t", " ", "日", "\u2028", "\x0b", "x" * 50])
        for _ in range(9)
    )


# ---- CSV


@pytest.mark.parametrize("options", [{}, {"delimiter": ";"}, {"delimiter": "\t"}, {"quoting": csv.QUOTE_ALL}])
@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_rows_are_those_of_the_csv_module(options, size):
    generator = random.Random(size)
    table = [[random_cell(generator) for _ in range(3)] for _ in range(200)]
    text = csv_of(["joke", "score", "who"], *table, **options)
    found = [list(record.value.values()) for record in csv_records("x.csv", cut(text, size), is_tsv=False)]
    assert found == table


def test_a_csv_file_gives_a_document_per_row_of_its_text_column(tmp_path, capsys):
    table = csv_of(["joke", "score"], ['a "b", c\nd', 1], ["", 2], ["e", 3], lineterminator="\n") + "\n\n"
    manifest = prepare_here(tmp_path / "out", write(tmp_path / "x.csv", "\ufeff" + table), val_fraction=0)
    assert documents_of(tmp_path / "out") == ['a "b", c\nd', "e"]
    assert manifest["source"]["empty_docs"] == 1
    assert "x.csv: the text is the field 'joke'; choose another one with --field" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("end", [True, False])
def test_every_line_ending_ends_a_row(tmp_path, ending, end):
    text = ending.join(["n;text", "1;a", "2;b"]) + ending * end
    prepare_here(tmp_path / "out", write(tmp_path / "x.csv", text), val_fraction=0)
    assert documents_of(tmp_path / "out") == ["a", "b"]


def test_keep_crlf_holds_for_the_fields_of_a_csv_file(tmp_path):
    source = write(tmp_path / "x.csv", b'n,text\r\n1,"a\r\nb\rc\nd"\r\n2,e\r\n')
    prepare_here(tmp_path / "out", source, keep_crlf=True, val_fraction=0)
    assert documents_of(tmp_path / "out") == ["a\r\nb\rc\nd", "e"]
    prepare_here(tmp_path / "out", source, val_fraction=0)
    assert documents_of(tmp_path / "out") == ["a\nb\nc\nd", "e"]


@pytest.mark.parametrize("before", ["", "\n", "\r\n \r\n", "\ufeff\n", "sep=;\n", '\ufeff"sep=;"\r\n', "\nsep=;\n"])
@pytest.mark.parametrize("empty", ["", ";", ";;;", "; "])
def test_blank_lines_excels_own_line_and_empty_columns_are_no_fields(tmp_path, before, empty):
    text = f"{before}n; text{empty}\n1;a, b, c{empty}\n2;d{empty}\n"
    prepare_here(tmp_path / "out", write(tmp_path / "x.csv", text), val_fraction=0)
    assert documents_of(tmp_path / "out") == ["a, b, c", "d"]
    line = text.count("\n")
    with pytest.raises(InputError, match=rf"x\.csv:{line + 1}: 9 fields"):
        prepare_here(tmp_path / "out2", write(tmp_path / "x.csv", text + ";" * 8 + "\n"))


def test_the_line_of_excel_names_the_delimiter_whatever_the_columns_hold(tmp_path):
    prepare_here(tmp_path / "out", write(tmp_path / "x.csv", "sep=|\na,b,c|text\n1,2,3|x, y\n"), val_fraction=0)
    assert documents_of(tmp_path / "out") == ["x, y"]
    prepare_here(tmp_path / "out", write(tmp_path / "x.csv", "sep=\t\ntext\n1, 2\n"), val_fraction=0)
    assert documents_of(tmp_path / "out") == ["1, 2"]


@pytest.mark.parametrize("bad", ['2,"He said "hi" there"', '2,"b"x', '2,"b" ', '"2" ,b', '2,"b\n2"x'])
def test_skip_drops_a_row_with_text_behind_a_closing_quote(tmp_path, bad):
    source = write(tmp_path / "x.csv", f'n,text\n1,a\n{bad}\n3,"c\nd"\n')
    with pytest.raises(InputError, match=r"x\.csv:3: not CSV \(text behind a closing quote\); correct the quotes"):
        prepare_here(tmp_path / "out", source)
    manifest = prepare_here(tmp_path / "out", source, errors="skip", val_fraction=0)
    assert documents_of(tmp_path / "out") == ["a", "c\nd"]
    assert manifest["source"]["undecodable"] == 1


def test_skip_does_not_drop_the_rows_behind_a_quote_that_never_closes(tmp_path):
    source = write(tmp_path / "x.csv", 'n,text\n1,a\n2,"b\n3,c\n')
    with pytest.raises(InputError, match=r"x\.csv:3: not CSV \(unexpected end of data\); correct the quotes"):
        prepare_here(tmp_path / "out", source, errors="skip")


def test_a_column_alone_may_hold_commas_without_quotes(tmp_path):
    prepare_here(tmp_path / "out", write(tmp_path / "x.csv", 'joke\none, two; "three"\nfour\n'), val_fraction=0)
    assert documents_of(tmp_path / "out") == ['one, two; "three"', "four"]


def test_a_tsv_file_has_tabs_whatever_else_its_header_holds(tmp_path):
    prepare_here(tmp_path / "out", write(tmp_path / "x.tsv", "a,b,c\ttext\n1\tx, y\n"), val_fraction=0)
    assert documents_of(tmp_path / "out") == ["x, y"]


@pytest.mark.parametrize(
    ("header", "delimiter"),
    [("a,b;c,d", ","), ("a;b", ";"), ("a\tb", "\t"), ("a|b", "|"), ("joke", "\x1f"), ('"a,b,c";d', ";"), ("", "\x1f")],
)
def test_the_first_line_tells_the_delimiter(header, delimiter):
    assert delimiter_of(header) == delimiter


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n,text\n1,a\n2,b, c\n", r"x\.csv:3: 3 fields, the first line has 2; put quotes around"),
        ("n,text\n1,a\n2\n", r"x\.csv:3: 1 fields, the first line has 2"),
        ('n,text\n1,a\n2,"b\n3,c\n' + "4,d\n" * 99, r"x\.csv:3: not CSV \(.*\); correct the quotes of this row"),
        ('n,text\n1,"a\nb"\n2,"c" d\n', r"x\.csv:4: not CSV"),
        ("text,text\na,b\n", r"x\.csv:1: two columns have one name: text, text; rename them"),
    ],
)
def test_a_malformed_row_is_named_by_its_line(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        prepare_here(tmp_path / "out", write(tmp_path / "x.csv", text), val_fraction=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "text\n", "text"])
def test_a_csv_file_without_rows_has_no_documents(tmp_path, text):
    with pytest.raises(InputError, match=r"x\.csv: no documents"):
        prepare_here(tmp_path / "out", write(tmp_path / "x.csv", text))


def test_skip_drops_a_bad_record_and_replace_keeps_it(tmp_path):
    source = write(tmp_path / "x.csv", "n,text\n1,a\n2,b\xff\n3\n4,d\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"x\.csv: invalid UTF-8 at byte 14 \(0xff\)"):
        prepare_here(tmp_path / "out", source)
    manifest = prepare_here(tmp_path / "out", source, errors="skip", val_fraction=0)
    assert documents_of(tmp_path / "out") == ["a", "d"]
    assert manifest["source"]["undecodable"] == 2
    with pytest.raises(InputError, match=r"x\.csv:4: 1 fields"):
        prepare_here(tmp_path / "out", source, errors="replace", val_fraction=0)
    source = write(tmp_path / "y.csv", "n,text\n1,a\n2,b\xff\n".encode("latin-1"))
    manifest = prepare_here(tmp_path / "out", source, errors="replace", val_fraction=0)
    assert documents_of(tmp_path / "out") == ["a", "b\ufffd"]
    assert manifest["source"]["replaced"] == 1


def test_records_have_the_encoding_and_line_breaks_of_texts_and_are_not_split(tmp_path, capsys):
    table = csv_of(["text"], *(["Élève à la fenêtre, ça été\r\n" + str(n)] for n in range(9)))
    lines = write(tmp_path / "x.txt", "y\nz")
    for encoding in ("cp1252", "utf-16", "utf-16-le"):
        source = write(tmp_path / "x.csv", table, encoding=encoding)
        prepare_here(tmp_path / "out", source, lines, split_on="lines", val_fraction=0)
        texts = documents_of(tmp_path / "out")
        assert texts[:-2] == [f"Élève à la fenêtre, ça été\n{n}" for n in range(9)] and len(texts) == 11
        assert f"x.csv: not UTF-8, read as {encoding}" in capsys.readouterr().out
    columns = parquet_file(tmp_path / "x.parquet", text=["a\r\nb\rc"])
    values = write(tmp_path / "x.json", json.dumps([{"text": "a\r\nb\rc"}]))
    prepare_here(tmp_path / "out", columns, values, val_fraction=0)
    assert documents_of(tmp_path / "out") == ["a\nb\nc"] * 2
    prepare_here(tmp_path / "out", columns, values, keep_crlf=True, val_fraction=0)
    assert documents_of(tmp_path / "out") == ["a\r\nb\rc"] * 2


def test_a_field_longer_than_the_csv_modules_limit_is_read(tmp_path):
    text = "word " * 60_000
    prepare_here(tmp_path / "out", write(tmp_path / "x.csv", f'text\n"{text}"\n{text}\n'), val_fraction=0)
    assert documents_of(tmp_path / "out") == [text, text]


# ---- JSON


@pytest.mark.parametrize("size", [1, 2, 13, 100_000])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_gives_what_the_json_module_gives(size, indent):
    generator = random.Random(size)
    values = [{"text": random_cell(generator), "n": [n, n / 7, None, True, {"deep": "\ud800"}]} for n in range(50)]
    text = json.dumps(values, indent=indent)
    assert [record.value for record in json_records("x.json", cut(text, size))] == values
    text = "\n ".join(json.dumps(value, indent=indent, ensure_ascii=False) for value in values)
    assert [record.value for record in json_records("x.json", cut(text, size))] == values


@pytest.mark.parametrize("size", range(1, 9))
def test_numbers_are_read_whole_wherever_the_text_is_cut(size):
    text = '[1.5e+3, "a", -12, 0.25, 7E2, 123456, {"n": 1e-3}, 5]'
    assert [record.value for record in json_records("x", cut(text, size))] == json.loads(text)
    assert [record.value for record in json_records("x", cut("12 -3.5e2\n7", size))] == [12, -350.0, 7]


def test_lines_of_json_are_counted():
    text = '\n[\n {"a":\n 1},\n\n {"a": 2}\n]'
    for size in (1, 3, 99):
        assert [record.line for record in json_records("x.json", cut(text, size))] == [3, 6]


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
@pytest.mark.parametrize(
    "text",
    ['[{"text": "a"}, {"text": "b"}]', '\ufeff\n [\n{"text":\n"a"},{"text": "b"}\n]\n', '["a", "b"]'],
)
def test_an_array_is_read_whatever_its_name(tmp_path, name, text):
    prepare_here(tmp_path / "out", write(tmp_path / name, text), val_fraction=0)
    assert documents_of(tmp_path / "out") == ["a", "b"]


@pytest.mark.parametrize(
    "text", [rows("a", "b"), '{"text": "a"}\n\n{\n"text": "b"}', '{"text": "a"}{"text": "b"}', '{"text": "ab"}']
)
def test_a_json_file_may_hold_one_object_or_several(tmp_path, text):
    prepare_here(tmp_path / "out", write(tmp_path / "x.json", text), val_fraction=0)
    assert "".join(documents_of(tmp_path / "out")) == "ab"


@pytest.mark.parametrize("name", ["x.jsonl", "x.ndjson", "x.json"])
def test_one_object_per_line_is_read_under_each_of_its_names(tmp_path, name):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / name, rows("a", "b"))
    prepare_here(tmp_path / "out", tmp_path / "in", val_fraction=0)
    assert documents_of(tmp_path / "out") == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[{"text": "a"},\n{"text": b}]', 2),
        ('[{"text": "a"}\n{"text": "b"}]', 2),
        ('[{"text": "a"},\n', 2),
        ('[\n{"text": "a', 2),
        ('[{"text": "a"},]', 1),
        ('[{"text": "a"}]\n\nx', 3),
        ("[" * 200_000, 1),
        ('[{"text": "a", "n": ' + "1" * 5_000 + "}]", 1),
        ("[{]", 1),
        ("plain text", 1),
    ],
)
def test_text_that_is_not_json_is_named_by_its_line(tmp_path, text, line):
    with pytest.raises(InputError, match=rf"x\.json:{line}: not JSON \(.+\); correct it"):
        prepare_here(tmp_path / "out", write(tmp_path / "x.json", text))


@pytest.mark.parametrize("value", ['{"n": ' + "1" * 5_000 + "}", "[" * 100_000, '{"text": "a"} {"text": "b"}'])
def test_fault_004_a_line_that_is_not_one_json_value_is_named(tmp_path, value):
    source = write(tmp_path / "x.jsonl", rows("a") + value + "\n")
    with pytest.raises(InputError, match=r'x\.jsonl:2: expected an object with string field "text", it is not JSON \('):
        prepare_here(tmp_path / "out", source)


# ---- limits


def test_a_longer_record_than_the_limit_is_refused_by_its_line(tmp_path, monkeypatch):
    for module in ("records", "sources"):
        monkeypatch.setattr(f"gpt.text.{module}.RECORD_LIMIT", 200_000)
    long = "x" * 300_000
    for name, text in (
        ("x.jsonl", rows("a", long)),
        ("x.json", rows("a", long)),
        ("x.json", '[{"text": "a"},\n{"text": "' + long * 5),
        ("x.csv", f"text\na\n{long}\n"),
        ("x.csv", 'text\na\n"' + "line\n" * 100_000),
    ):
        with pytest.raises(InputError, match=r"x\.\w+:[23]: (longer than 200,000|not CSV \(field larger)"):
            prepare_here(tmp_path / "out", write(tmp_path / name, text))


@pytest.mark.parametrize(
    "make",
    [
        lambda n: f'{{"text": "{n} {"x" * 500}"}},',
        lambda n: f'{n},"a ""b""\n{"x" * 500}"\n',
    ],
)
def test_memory_does_not_grow_with_the_file(make):
    def peak(count):
        pieces = (make(n) for n in range(count))
        is_json = make(0).startswith("{")
        texts = itertools.chain(["[" if is_json else "n,text\n"], pieces, ['{"text": ""}]'] if is_json else [])
        reader = json_records("x", texts) if is_json else csv_records("x", texts, is_tsv=False)
        tracemalloc.start()
        assert sum(1 for _ in reader) == count + is_json
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    assert peak(20_000) < peak(1_000) + 100_000


def test_lines_keep_other_separators():
    text = "a\u2028b\x0bc\x85d\x1ee\r\nf\rg\n\nh"
    for size in (1, 2, 99):
        assert list(lines_of("x", cut(text, size))) == ["a\u2028b\x0bc\x85d\x1ee\r\n", "f\r", "g\n", "\n", "h"]


# ---- Parquet


def parquet_file(path, row_group_size=7, **columns):
    parquet.write_table(pyarrow.table(columns), path, row_group_size=row_group_size)
    return path


def test_a_parquet_file_gives_a_document_per_row(tmp_path):
    texts = [f"text {n}é" for n in range(1000)]
    source = parquet_file(tmp_path / "x.parquet", n=list(range(1000)), text=texts)
    prepare_here(tmp_path / "out", source, val_fraction=0)
    assert documents_of(tmp_path / "out") == texts


def test_the_only_column_of_strings_is_the_text_and_null_is_empty(tmp_path, capsys):
    columns = {"n": [1, 2, 3], "joke": pyarrow.array(["a", None, "b"], pyarrow.large_string()).dictionary_encode()}
    manifest = prepare_here(tmp_path / "out", parquet_file(tmp_path / "x.parquet", **columns), val_fraction=0)
    assert documents_of(tmp_path / "out") == ["a", "b"]
    assert manifest["source"]["empty_docs"] == 1
    assert "x.parquet: the text is the field 'joke'" in capsys.readouterr().err


def test_a_path_leads_into_a_struct(tmp_path):
    source = parquet_file(tmp_path / "x.parquet", data=[{"text": "a", "n": 1}, {"text": None, "n": 2}, None])
    prepare_here(tmp_path / "out", source, field="data.text", val_fraction=0)
    assert documents_of(tmp_path / "out") == ["a"]
    with pytest.raises(
        InputError, match=r"x\.parquet: which field is the text\? it has data\.text \(string\), data\.n"
    ):
        prepare_here(tmp_path / "out", source)
    with pytest.raises(InputError, match=r'string field "data\.n", it has data\.text \(string\), data\.n \(number\)'):
        prepare_here(tmp_path / "out", source, field="data.n")


def test_a_damaged_parquet_file_is_refused(tmp_path):
    source = parquet_file(tmp_path / "x.parquet", text=["word " * 100] * 100)
    data = source.read_bytes()
    for bad in (
        data[:-20],
        data[:4] + bytes(len(data) - 8) + data[-4:],
        b"PAR1" + random.Random(0).randbytes(999) + b"PAR1",
    ):
        with pytest.raises(InputError, match=r"x\.parquet: damaged Parquet file \(.+\); restore it"):
            prepare_here(tmp_path / "out", write(tmp_path / "x.parquet", bad))


# ---- the field with the text


@pytest.mark.parametrize(
    ("sample", "field"),
    [
        ([{"text": "a", "joke": "b"}], "text"),
        ([{"id": "x", "Text": "a"}], "Text"),
        ([{"title": "t", "content": "a"}], "content"),
        ([{"body": "a", "content": "b"}], "content"),
        ([{"joke": "a", "score": "3", "when": "2024-01-01", "rate": "1.5e3", "none": ""}], "joke"),
        ([{"joke": "", "n": 1}, {"joke": "a", "n": 2}], "joke"),
        ([{"text": None}, {"text": "a"}], "text"),
        ([{"text": {"deep": "x"}, "body": "a"}], "body"),
        ([], "text"),
        (["a", "b"], "text"),
    ],
)
def test_the_field_of_the_text_is_found(sample, field):
    assert choose_field("x", sample) == field


@pytest.mark.parametrize(
    ("value", "fields"),
    [
        ({"title": "a", "summary": "b"}, r"title \(string\), summary \(string\)"),
        ({"posts": [{"role": "user"}]}, r"posts \(list\)"),
        ({"version": "1.1", "data": []}, r"version \(string\), data \(list\)"),
        ({"data": {"text": "a"}}, r"data\.text \(string\)"),
        ({"n": 1, "b": True, "z": None}, r"n \(number\), b \(boolean\), z \(null\)"),
        ({}, "no fields"),
        ({f"f{n}": "text" for n in range(20)}, r"f7 \(string\) and 12 more"),
    ],
)
def test_fields_of_which_none_or_several_could_be_the_text_are_named(tmp_path, value, fields):
    for name, text in (("x.jsonl", jsonl(value)), ("x.json", json.dumps([value]))):
        with pytest.raises(
            InputError, match=rf"{name}: which field is the text\? it has .*{fields}; choose one with --field"
        ):
            prepare_here(tmp_path / "out", write(tmp_path / name, text))


def test_a_path_leads_into_objects_and_a_name_with_a_dot_wins(tmp_path):
    source = write(tmp_path / "x.jsonl", jsonl({"a": {"b": {"c": "x"}}}, {"a.b.c": "y", "a": 1}))
    prepare_here(tmp_path / "out", source, field="a.b.c", val_fraction=0)
    assert documents_of(tmp_path / "out") == ["x", "y"]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv"])
def test_fault_004_a_field_that_is_not_there_names_those_that_are(tmp_path, name):
    text = "a,b\nx,y\n" if name == "x.csv" else jsonl({"a": "x", "b": "y"})
    with pytest.raises(InputError, match=r'string field "zzz", it has a \(string\), b \(string\); .*--field'):
        prepare_here(tmp_path / "out", write(tmp_path / name, text), field="zzz")


def test_a_field_of_a_file_without_fields_is_an_error(tmp_path):
    for name in ("x.txt", "x.html", "x.py"):
        with pytest.raises(InputError, match=rf"--field body: .*{name} has no fields.*; leave --field out"):
            prepare_here(tmp_path / "out", write(tmp_path / name, "body"), field="body")
    files = write(tmp_path / "x.txt", "a"), write(tmp_path / "x.csv", "n,body\n1,b\n")
    prepare_here(tmp_path / "out", *files, field="body", val_fraction=0)
    assert documents_of(tmp_path / "out") == ["a", "b"]


def test_the_limit_of_a_message_holds_for_long_names(tmp_path):
    with pytest.raises(InputError) as error:
        prepare_here(tmp_path / "out", write(tmp_path / "x.jsonl", jsonl({"k" * 10_000: "a", "j" * 10_000: "b"})))
    assert len(str(error.value)) < 500
    assert records.SHOWN == 8
