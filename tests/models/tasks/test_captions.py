"""Lists of videos with captions, and which caption an epoch takes."""

from __future__ import annotations

import itertools

import pytest

from i2v_models.tasks.captions import digest, drawn, read_captions


def listed(folder, text: str) -> str:
    (folder / "captions.csv").write_text(text)
    for name in "ab":
        (folder / f"{name}.mp4").touch()
    return str(folder / "captions.csv")


def test_rows_of_one_path_are_captions_of_one_video_relative_to_the_list(tmp_path):
    data = listed(tmp_path, 'path,caption\nb.mp4,a dog\na.mp4,"a cat, a tree"\nb.mp4,a run\nb.mp4,a dog\n')
    found = read_captions(data)
    assert found.videos == [str(tmp_path / "b.mp4"), str(tmp_path / "a.mp4")]
    assert found.texts == [["a dog", "a run", "a dog"], ["a cat, a tree"]]


def test_it_is_read_as_any_list_is(tmp_path):
    data = listed(tmp_path, "Sentence;label;video_id\nein Hund;3;a.mp4\n")
    assert read_captions(data).texts == [["ein Hund"]]
    assert read_captions([("a.mp4", None, "x"), ("a.mp4", 2, "y")]) == (["a.mp4"], [["x", "y"]])


@pytest.mark.filterwarnings("ignore:.*columns that are not used")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("path,label\na.mp4,3\n", r"data='.*captions.csv' has no captions; .* names the columns path and caption"),
        ("path,words\na.mp4,a dog\n", r"has no captions; "),
        ("path,caption\na.mp4,x\nb.mp4,\na.mp4,y\n", r"data='.*' has no caption in row 2 of 3: .*b.mp4"),
        ("path,caption\na.mp4,x\na.mp4,  \n", r"has no caption in row 2 of 2: .*a.mp4"),
    ],
)
def test_what_is_missing_is_named(tmp_path, text, said):
    with pytest.raises(ValueError, match=said):
        read_captions(listed(tmp_path, text))


def test_each_caption_comes_once_in_as_many_epochs():
    texts = list("abcde")
    order = [drawn(texts, 7, epoch, 3) for epoch in range(20)]
    cycles = [order[first : first + 5] for first in range(0, 20, 5)]
    assert all(sorted(cycle) == texts for cycle in cycles)
    assert len({tuple(cycle) for cycle in cycles}) > 1


def test_what_is_drawn_depends_on_seed_epoch_and_video_alone():
    texts = [str(number) for number in range(50)]
    draws = {key: drawn(texts, *key) for key in itertools.product((0, 1), (0, 1, 50), (0, 1))}
    assert len(set(draws.values())) > 6
    assert draws == {key: drawn(texts, *key) for key in reversed(draws)}


def test_another_caption_is_another_digest():
    one = [["a", "b"], ["c"]]
    assert digest(one) == digest([("a", "b"), ("c",)])
    assert len({digest(one), digest([["a"], ["b", "c"]]), digest([["b", "a"], ["c"]]), digest([["a", "b"], ["d"]])}) == 4
