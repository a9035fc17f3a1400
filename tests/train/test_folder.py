import os

from gcompute.train.folder import AGAIN, walk


def tree(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def test_linked_folders_are_read_once_and_circles_end(tmp_path):
    root, other = tmp_path / "root", tmp_path / "other"
    tree(root, "a.txt", "inner/b.txt")
    tree(other, "c.txt")
    (root / "z_link").symlink_to(other)
    (root / "again").symlink_to(other)
    (root / "inner" / "up").symlink_to(root)
    (other / "back").symlink_to(root / "inner")
    found, skipped = walk(root, follow=True)
    assert list(found) == ["a.txt", "again/c.txt", "inner/b.txt"]
    assert dict(skipped) == {"again/back": AGAIN, "inner/up": AGAIN, "z_link": AGAIN}
    assert list(walk(root, follow=False)[0]) == ["a.txt", "inner/b.txt"]


def test_a_link_to_a_file_that_is_read_is_left_out(tmp_path):
    root = tmp_path / "root"
    tree(root, "b.txt")
    tree(tmp_path, "outside.txt")
    (root / "a.txt").symlink_to("b.txt")
    (root / "c.txt").symlink_to("../outside.txt")
    (root / "d.txt").symlink_to("../outside.txt")
    found, skipped = walk(root, follow=True)
    assert list(found) == ["b.txt", "c.txt"]
    assert dict(skipped) == {"a.txt": AGAIN, "d.txt": AGAIN}


def test_what_is_no_file_is_named(tmp_path):
    tree(tmp_path, "a.txt", ".hidden/b.txt", "site-packages/c.txt")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "self").symlink_to("self")
    found, skipped = walk(tmp_path, follow=True)
    assert list(found) == ["a.txt"]
    assert skipped == (("gone", "broken link"), ("pipe", "pipe, device or socket"), ("self", "broken link"))
