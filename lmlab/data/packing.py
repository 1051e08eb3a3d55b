"""Best-fit packing: training documents are put into blocks whole, unless they are longer than one.

(Ding et al. 2024, "Fewer truncations improve language modeling".)

Shapes: P pieces, each of which is a document, or a part of one that is longer than a block.
"""

from bisect import bisect_left, insort

import numpy as np

from lmlab.data.documents import running_sums


def pack_documents(lengths: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Puts documents into blocks such that no document is cut that fits into one.

    A document that is longer than a block is cut into pieces of `block_size` tokens and a rest; any other is one piece.
    From the longest to the shortest, each piece goes into the block with the least space that is enough for it, or into
    a new one. Documents of 3, 5, 2 and 1 tokens at `block_size=4`:

        documents    a a a b b b b b c c d
        token        0 1 2 3 4 5 6 7 8 9 10
        blocks       b b b b    a a a b    c c d

        pieces       [[3, 7], [0, 3], [7, 8], [8, 10], [10, 11]]
        edges        [0, 1, 3, 5]

    Args:
        lengths: [documents] tokens of each.
        block_size: the greatest number of tokens of a block.

    Returns:
        the first token of each piece and the one past its last, [P, 2] int64, in a block in the order of the text; and
        edges [blocks + 1] int64: block b has the pieces edges[b] … edges[b + 1] - 1.
    """
    count = -(-lengths // block_size)  # the pieces of each document; an empty one has none
    number = np.arange(count.sum()) - np.repeat(running_sums(count)[:-1], count)
    starts = np.repeat(running_sums(lengths)[:-1], count) + number * block_size
    ends = np.minimum(starts + block_size, np.repeat(running_sums(lengths)[1:], count))
    sizes = ends - starts
    block = np.empty(len(sizes), np.int64)
    shortness = (block_size - sizes).astype(np.min_scalar_type(block_size))  # numpy sorts short integers much faster
    block[np.argsort(shortness, kind="stable")] = best_fit(np.bincount(sizes), block_size)
    order = np.argsort(block, kind="stable")
    return np.stack([starts, ends], axis=1)[order], running_sums(np.bincount(block))


def best_fit(counts: np.ndarray, block_size: int) -> np.ndarray:
    """Returns the block of each piece by best-fit decreasing: [P] int64, the longest piece first.

    The blocks that have the same space are filled by pieces of one length together, as if it were done one by one. So
    the time does not grow with the number of pieces, but for the last step, which numpy takes.

    Args:
        counts: the number of pieces of each length from 0 on, of which none is longer than `block_size`.
    """
    spaces: list[int] = []  # that blocks have, in ascending order
    blocks_of: dict[
        int, list[tuple[int, int]]
    ] = {}  # that have a space: ranges of them, each by its first and its size

    def add(space: int, first: int, size: int) -> None:
        if space and size:
            if space not in blocks_of:
                insort(spaces, space)
            blocks_of.setdefault(space, []).append((first, size))

    total, filled = 0, list[tuple[int, int, int]]()
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            least = bisect_left(spaces, length)
            if least < len(spaces):
                space = spaces[least]
                first, size = blocks_of[space].pop()
                if not blocks_of[space]:
                    del blocks_of[space], spaces[least]
            else:
                space, first, size = block_size, total, -(-left // (block_size // length))
                total += size
            each = space // length
            pieces = min(left, size * each)
            full, more = divmod(pieces, each)  # blocks that get as many as they can; pieces of one that gets fewer
            one = int(more > 0)
            add(space - each * length, first, full)
            add(space - more * length, first + full, one)
            add(space, first + full + one, size - full - one)
            filled.append((first, each, pieces))
            left -= pieces
    firsts, each_gets, pieces_of = np.array(filled, np.int64).reshape(-1, 3).T
    number = np.arange(pieces_of.sum()) - np.repeat(running_sums(pieces_of)[:-1], pieces_of)
    blocks: np.ndarray = np.repeat(firsts, pieces_of) + number // np.repeat(each_gets, pieces_of)
    return blocks
