"""Pieces of text out of the bytes of tokens, against decoding everything at once."""

import random

from gpt.generate.stream import TextStream


def chunks(data, seed):
    random.seed(seed)
    while data:
        size = random.randint(1, 4)
        yield data[:size]
        data = data[size:]


def random_bytes(seed):
    """Bytes in which whole, cut and mixed-up characters are all common."""
    random.seed(seed)
    pieces = ["a", "é", "日", "😀", "\n"]
    data = b"".join(random.choice(pieces).encode() for _ in range(random.randint(0, 12)))
    damage = [random.randrange(len(data)) for _ in range(random.randint(0, 3))] if data else []
    return bytes(random.randrange(256) if i in damage else byte for i, byte in enumerate(data))[: random.randint(0, 40)]


def test_fault_089_joined_pieces_are_the_one_shot_decoding_of_any_bytes():
    for seed in range(2000):
        data, stream = random_bytes(seed), TextStream()
        pieces = [stream.push(piece) for piece in chunks(data, seed)]
        assert "".join(pieces) + stream.push(b"", final=True) == data.decode("utf-8", "replace")


def first_stop(text, stops):
    """Brute force: character by character, cut where a stop string becomes complete."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


def test_stop_strings_cut_the_same_text_however_it_is_split_into_tokens():
    for seed in range(2000):
        random.seed(seed)
        text = "".join(random.choice("ab") for _ in range(14))
        stops = tuple("".join(random.choice("ab") for _ in range(random.randint(1, 5))) for _ in range(2))
        stream, shown = TextStream(stops), ""
        for piece in chunks(text.encode(), seed):
            shown += stream.push(piece)
            assert first_stop(text, stops).startswith(shown)
        assert shown + stream.push(b"", final=True) == first_stop(text, stops)


def test_text_that_cannot_begin_a_stop_string_is_not_held_back():
    stream = TextStream(("ENDE",))
    assert [stream.push(piece) for piece in (b"xE", b"N", b"Dx", b"E")] == ["x", "", "ENDx", ""]
