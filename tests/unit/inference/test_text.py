"""Text is shown as it comes, up to a stop text, and never a part of a character."""

from mixtral_recipes.inference.text import GrowingText


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return bytes(tokens).decode(errors="replace")


def shown(text: str, *stop: str) -> tuple[list[str], GrowingText]:
    found = GrowingText(Bytes(), stop)
    pieces = []
    for byte in text.encode():
        pieces.append(found.add(byte))
        if found.stopped:
            break
    return [*pieces, found.rest()], found


def test_pieces_make_up_the_text() -> None:
    pieces, found = shown("größer als 10 €\n")
    assert "".join(pieces) == found.shown == "größer als 10 €\n"
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_stop_text_ends_it_and_is_not_shown() -> None:
    pieces, found = shown("yes.\nUser: more", "\nUser:", "###")
    assert found.stopped
    assert "".join(pieces) == found.shown == "yes."


def test_what_only_began_like_a_stop_text_is_shown_at_the_end() -> None:
    pieces, found = shown("a ##", "###")
    assert not found.stopped
    assert "".join(pieces) == "a ##"
