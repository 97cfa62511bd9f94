"""Reads records out of CSV, JSON, JSONL and Parquet files: one checked reader for each format, and one rule that
finds the field with the text. Memory does not grow with the file; a record may have RECORD_LIMIT characters."""

import contextlib
import csv
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import IO, Any, NamedTuple

from gpt.errors import InputError
from gpt.text.containers import extra

RECORD_LIMIT = 1 << 26  # characters of a line, a field or a JSON value
SAMPLE = 20  # records from which the field is chosen
FIELDS = ("text", "content", "body", "document", "article", "story")  # names of fields that are the text
NO_TEXT = re.compile(r"\s*([-+\d.,:/% ]+(e[-+]?\d+|T[\d:.]+Z?)?|true|false|null|nan|none|n/a)?\s*", re.IGNORECASE)
WHITE_SPACE = re.compile(r"[ \t\r\n]*")
DELIMITER_LINE = re.compile(r'"?sep=(.)"?\r?\n')  # Excel's own first line of a CSV file
SHOWN = 8  # fields named in a message


class Record(NamedTuple):
    """A record. `value` is an object by field name, or a string; `problem` says why there is none."""

    line: int  # the line where it begins, from 1; in Parquet the row
    value: Any
    problem: InputError | None = None


# ---- the field with the text


def choose_field(name: str, records: Iterable[Any]) -> str:
    """Returns the field that holds the text of the records of the file `name`: one that is called as FIELDS says, else
    the only field with text in it. Looks at the first SAMPLE records. Raises InputError, which names the fields, if
    more fields or none could be the text."""
    sample = [value for value in itertools.islice(records, SAMPLE) if isinstance(value, dict)]
    keys = list(dict.fromkeys(key for value in sample for key in value))
    for wanted in FIELDS:
        for key in keys:
            types = {type(value.get(key)) for value in sample}
            if key.lower() == wanted and (str in types or types == {type(None)}):
                return key
    texts = [key for key in keys if any(is_text(value.get(key)) for value in sample)]
    if len(texts) == 1 and not any(isinstance(item, (dict, list)) for value in sample for item in value.values()):
        return texts[0]
    if not sample:
        return "text"  # the file is empty or malformed, which reading it will tell
    raise InputError(f"{name}: which field is the text? it has {fields_of(sample[0])}; choose one with --field")


def is_text(value: Any) -> bool:
    """Returns whether a value is a string, but neither blank nor a number, date or time."""
    return isinstance(value, str) and not NO_TEXT.fullmatch(value)


def text_of(record: Record, field: str, where: str) -> str:
    """Returns the string in `field` of a record. `field` is a name, or a path of names with dots between them:
    text_of(Record(1, {"a": {"b": "x"}}), "a.b", …) == "x". A record that is a string is the text itself. Raises
    InputError, which names the fields that are there, if there is no such string."""
    if record.problem:
        raise record.problem
    value = record.value
    text = value if isinstance(value, str) else dig(value, field)
    if not isinstance(text, str):
        has = f"it has {fields_of(value)}" if isinstance(value, dict) else f"it is {type_of(value)}"
        advice = "correct it, or give another --field or --errors skip"
        raise InputError(f'{where}: expected an object with string field "{field}", {has}; {advice}')
    return text


def dig(value: Any, field: str) -> Any:
    """Returns what the name or path `field` leads to, or None."""
    if isinstance(value, dict) and field in value:
        return value[field]
    for key in field.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def fields_of(value: dict[str, Any]) -> str:
    """Returns the fields of a record, for a message: 'a (string), b.c (number), d (list)'."""
    parts = []
    for key, item in value.items():
        nested = {f"{key}.{inner}": deep for inner, deep in item.items()} if isinstance(item, dict) else {}
        parts += [f"{path[:60]} ({type_of(entry)})" for path, entry in (nested or {key: item}).items()]
    more = f" and {len(parts) - SHOWN} more" if len(parts) > SHOWN else ""
    return (", ".join(parts[:SHOWN]) + more) or "no fields"


def type_of(value: Any) -> str:
    names = {str: "string", bool: "boolean", type(None): "null", dict: "object", list: "list"}
    return names.get(type(value), "number")


# ---- JSON


def line_record(line: str, where: str, wanted: str) -> Record:
    """Returns the JSON object of a line. Raises InputError, which says that an object with `wanted` is expected, if the
    line is anything else."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise not_json(f"{where}: expected an object with {wanted}, it is", error) from None
    if isinstance(value, str):  # a text in an array of JSON, but not in a line
        raise InputError(f"{where}: expected an object with {wanted}, it is string; correct it")
    return Record(1, value)


def not_json(place: str, error: Exception) -> InputError:
    reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    reason = reason.replace("Extra data", "more than one value in a line")
    return InputError(f"{place} not JSON ({reason}); correct it")


def json_records(name: str, texts: Iterable[str]) -> Iterator[Record]:
    """Yields the values of a JSON text: the elements of its array, or the values that stand one after another in it."""
    reader = JsonReader(name, texts)
    if reader.peek() != "[":
        while reader.peek():
            yield reader.value()
        return
    reader.skip()
    closed = reader.peek() == "]"
    while not closed:
        yield reader.value()
        following = reader.peek()
        if following not in (",", "]"):
            raise not_json(f"{name}:{reader.line}:", ValueError("expected , or ] after an element of the array"))
        closed = following == "]"
        if not closed:
            reader.skip()
    reader.skip()
    if reader.peek():
        raise not_json(f"{name}:{reader.line}:", ValueError("text after the end of the array"))


class JsonReader:
    """Reads JSON values from a stream of texts. Holds the text of one value, no more."""

    def __init__(self, name: str, texts: Iterable[str]):
        self.name, self.texts = name, iter(texts)
        self.buffer, self.at, self.line = "", 0, 1
        self.decoder = json.JSONDecoder()

    def peek(self) -> str:
        """Skips white space. Returns the next character, or "" at the end of the text."""
        while True:
            self.advance(WHITE_SPACE.match(self.buffer, self.at).end())  # type: ignore[union-attr]
            if self.at < len(self.buffer) or not self.more():
                return self.buffer[self.at : self.at + 1]

    def skip(self) -> None:
        self.advance(self.at + 1)

    def advance(self, to: int) -> None:
        self.line += self.buffer.count("\n", self.at, to)
        self.at = to

    def more(self) -> bool:
        """Appends text, at least as much as waits in the buffer, so that parsing it again costs little. Returns False,
        and changes nothing, at the end of the text."""
        parts = [self.buffer[self.at :]]
        wanted, size = len(parts[0]) + 1, 0
        while size < wanted and (text := next(self.texts, None)) is not None:
            parts.append(text)
            size += len(text)
        if size:
            self.buffer, self.at = "".join(parts), 0
        return size > 0

    def value(self) -> Record:
        """Returns the next value, with the number of its first line."""
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.at)
            except (ValueError, RecursionError) as error:
                if not (self.is_cut(error) and self.more()):
                    raise not_json(f"{self.name}:{self.line}:", error) from None
                if len(self.buffer) > RECORD_LIMIT:
                    raise too_long(f"{self.name}:{self.line}") from None
                continue
            if len(self.buffer) - end < 3 and self.more():  # a number may go on: 1 | 5, 1. | 5, 1e+ | 5
                continue
            record = Record(self.line, value)
            self.advance(end)
            return record

    def is_cut(self, error: Exception) -> bool:
        """Returns whether a value failed to parse only because its end has not been read yet."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.msg.startswith("Unterminated string") or error.pos >= len(self.buffer) - 16


def too_long(where: str) -> InputError:
    return InputError(f"{where}: longer than {RECORD_LIMIT:,} characters; split it, or give plain text")


# ---- CSV


def csv_records(name: str, texts: Iterable[str], is_tsv: bool) -> Iterator[Record]:
    """Yields the rows of a CSV text, whose first row names the fields, as objects. A row with more or fewer fields, or
    with text behind a closing quote, has a problem. Raises InputError for a quote that never closes."""
    lines = enumerate(lines_of(name, texts), 1)
    number, first = next(((number, line) for number, line in lines if line.strip()), (1, ""))
    declared = DELIMITER_LINE.fullmatch(first)
    if declared:
        number, first = next(lines, (number, ""))
    delimiter = declared[1] if declared else "\t" if is_tsv else delimiter_of(first)
    rows = csv_rows(name, itertools.chain([first], (line for _, line in lines)), delimiter, number)
    _, header, problem = next(rows, Record(number, []))
    if problem:
        raise problem
    header = [field.strip() for field in header]
    named = list(filter(None, header))  # spreadsheets may have empty columns
    if len(set(named)) < len(named):
        raise InputError(f"{name}:{number}: two columns have one name: {', '.join(header)[:200]}; rename them")
    for line, row, problem in rows:
        if not problem and len(row) != len(header):
            counts = f"{len(row)} fields, the first line has {len(header)}"
            problem = InputError(f"{name}:{line}: {counts}; put quotes around a field with the delimiter in it")
        yield Record(line, dict(zip(header, row, strict=False)), problem)


def csv_rows(name: str, lines: Iterable[str], delimiter: str, number: int) -> Iterator[Record]:
    """Yields each row that is not empty, as a Record of the list of its fields. `number` is that of the first line."""
    csv.field_size_limit(RECORD_LIMIT)  # there is no other way to set it; its default is 131,072
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        line, problem = number + reader.line_num, None
        try:
            row = next(reader, None)
        except csv.Error as error:
            reason = str(error)
            can_go_on = "expected after" in reason  # the reader then continues with the next line
            reason = "text behind a closing quote" if can_go_on else reason
            row, problem = [], InputError(f"{name}:{line}: not CSV ({reason}); correct the quotes of this row")
            if not can_go_on:
                raise problem from None
        if row is None:
            return
        if row or problem:
            yield Record(line, row, problem)


def delimiter_of(header: str) -> str:
    """Returns the delimiter of a CSV file, by its first line: the most frequent of , ; | and tab outside quotes. In a
    file of one column a comma is no delimiter."""
    bare = re.sub(r'"[^"]*"', "", header)
    delimiter = max(",;|\t", key=bare.count)
    return delimiter if delimiter in bare else "\x1f"


def lines_of(name: str, texts: Iterable[str]) -> Iterator[str]:
    """Yields the lines of a text that comes in pieces, each with its line break: \n, \r or \r\n."""
    breaks = io.IncrementalNewlineDecoder(None, translate=False)  # never divides \r\n
    parts: list[str] = []
    size = number = 0
    for text in itertools.chain(texts, [None]):
        for part in io.StringIO(breaks.decode(text or "", final=text is None), newline=""):
            parts.append(part)
            size += len(part)
            if part.endswith(("\n", "\r")):
                number += 1
                yield "".join(parts)
                parts, size = [], 0
        if size > RECORD_LIMIT:
            raise too_long(f"{name}:{number + 1}")
    if parts:
        yield "".join(parts)


# ---- Parquet


@contextlib.contextmanager
def arrow_errors(name: str) -> Iterator[None]:
    """Turns pyarrow's errors into an InputError that names the file; errors of the file system stay."""
    try:
        yield
    except (ValueError, OSError, arrow(name).ArrowException) as error:  # ArrowInvalid is a ValueError
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = str(error).partition("\n")[0][:200]
        raise InputError(f"{name}: damaged Parquet file ({reason}); restore it") from None


def arrow(name: str) -> Any:
    return extra(name, "pyarrow", "a Parquet file")


def parquet_records(name: str, file: IO[bytes], field: str) -> Iterator[Record]:
    """Yields the rows of a Parquet file, with the column that `field` names or leads through. Raises InputError if no
    string is there, if the file is damaged, or without pyarrow."""
    example = parquet_sample(name, file)
    text_of(Record(1, example), field, name)
    for record in parquet_rows(name, file, [field if field in example else field.split(".")[0]]):
        yield record if dig(record.value, field) is not None else record._replace(value="")  # null is an empty text


def parquet_rows(name: str, file: IO[bytes], columns: list[str]) -> Iterator[Record]:
    """Yields the rows of a Parquet file, with these columns. Raises InputError if the file is damaged, or without
    pyarrow."""
    parquet = extra(name, "pyarrow.parquet", "a Parquet file")
    with arrow_errors(name):
        numbers = itertools.count(1)
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=256, columns=columns):
            yield from map(Record, numbers, batch.to_pylist())


def parquet_sample(name: str, file: IO[bytes]) -> dict[str, Any]:
    """Returns an object that shows the fields of a Parquet file and their types."""
    parquet = extra(name, "pyarrow.parquet", "a Parquet file")
    with arrow_errors(name):
        return parquet_example(name, parquet.ParquetFile(file).schema_arrow)


def parquet_example(name: str, fields: Iterable[Any]) -> dict[str, Any]:
    return {field.name: example_of(name, field.type) for field in fields}


def example_of(name: str, kind: Any) -> Any:
    """Returns an example of a value of an Arrow type: a string, 0, a list or an object."""
    types = arrow(name).types
    if types.is_struct(kind):
        return parquet_example(name, [kind.field(index) for index in range(kind.num_fields)])
    if types.is_dictionary(kind):
        return example_of(name, kind.value_type)
    if types.is_list(kind) or types.is_large_list(kind):
        return [example_of(name, kind.value_type)]
    if types.is_nested(kind):
        return []
    return "text" if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) else 0
