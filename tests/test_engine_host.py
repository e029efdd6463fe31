"""The engine's host side, without a model: buckets, slots and what they share, pages of images."""

import dataclasses

import numpy as np

from avg_llava_jax.config import ModelConfig
from avg_llava_jax.inference.buckets import STEPS, bucket, chunk_bucket, offline_buckets, server_buckets
from avg_llava_jax.inference.image_pages import ImagePages, digest_of
from avg_llava_jax.inference.job import image_key, places_of
from avg_llava_jax.inference.scheduler import STEPS_BETWEEN_CHUNKS, Scheduler, Work

BUCKETS = server_buckets(ModelConfig(), slots=3, chunk=64, pages=20)


def test_buckets_of_the_7b_model():
    buckets = server_buckets(ModelConfig(), slots=8, chunk=256, pages=1)
    assert (buckets.chunks, buckets.rows, buckets.texts) == ((64, 256), (1, 4, 8), (256, 4096))
    assert buckets.windows == (528, 1040, 2064, 4112) and buckets.capacity == 4112
    assert buckets.tiles == (3, 4, 5, 8) and buckets.image_tiles == 5
    assert buckets.pages == 5  # one image fits, however little memory is given
    assert buckets.prompts == (1, 4) and buckets.resume_chunks == (64, 256)
    assert len(buckets.prefills) == 20 and len(buckets.decodes) == 12 and len(buckets.routes) == 4
    assert [bucket((4, 8), need) for need in (0, 4, 5, 9)] == [4, 4, 8, 8]


def test_prompts_that_are_known_share_few_programs():
    """Those that prefill alone are padded to as many as prefill together."""
    unknown, known = (offline_buckets(ModelConfig(), 32, 400, 1, prompts=prompts) for prompts in ((), (60, 70, 300)))
    assert (unknown.prompts, known.prompts) == ((1, 8), (8,))
    assert known.chunks == (64, 96, 320) and set(known.chunks) < set(unknown.chunks)
    assert offline_buckets(ModelConfig(), 1, 400, 1, prompts=(60,)).prompts == (1,)


def test_chunks_waste_little():
    for left in range(1, 2000):
        read, calls = 0, 0
        while read < left:
            read += chunk_bucket((32, 64, 128, 256), left - read)
            calls += 1
        assert read - left < 32 + read / 4 and calls <= left // 256 + 3


def prompt(keys):
    return Work(np.array(list(keys), np.int64))


def advance(scheduler, work):
    """Read the prompt of the only work that reads."""
    while work in scheduler.prefilling:
        scheduler.prefilled(scheduler.next_prefill())
    work.tokens.append(1000)


def test_prompts_take_turns_chunk_by_chunk():
    scheduler = Scheduler(BUCKETS)
    long, short = prompt(range(200)), prompt(range(500, 540))
    assert scheduler.admit(long).slot != scheduler.admit(short).slot
    seen = []
    while (prefill := scheduler.next_prefill()) is not None:
        assert (prefill.window > 0) == (prefill.works[0].cached > 0) and prefill.window in (0, 528)
        read = zip(prefill.works, prefill.lengths, strict=True)
        seen.append([("long" if work is long else "short", length) for work, length in read])
        ended = scheduler.prefilled(prefill)
        assert ended == [work for work in prefill.works if work.cached == len(work.keys)]
    assert seen == [[("long", 64), ("short", 40)], [("long", 64)], [("long", 64)], [("long", 8)]]
    assert scheduler.decoding == [short, long]
    assert scheduler.slots[long.slot].keys.tolist() == long.keys.tolist()


def test_a_chunk_at_the_end_of_a_slot_begins_earlier():
    """The last chunk of 4100 positions would end at 4160, behind a capacity of 4112."""
    scheduler = Scheduler(BUCKETS)
    long = prompt(range(4100))
    scheduler.admit(long)
    while (prefill := scheduler.next_prefill()) is not None:
        (start,), (length,) = prefill.starts, prefill.lengths
        assert start + prefill.chunk <= BUCKETS.capacity and start <= long.cached
        assert not prefill.window or prefill.window >= start + prefill.chunk
        scheduler.prefilled(prefill)
    assert (start, length) == (4048, 52) and long.cached == 4100 and len(scheduler.slots[long.slot].keys) == 4100


def test_prompts_of_one_size_come_together():
    """A call is full before its prompts get slots; of prompts with one prefix, the first goes ahead alone."""
    scheduler = Scheduler(dataclasses.replace(BUCKETS, slots=4, chunks=(32, 64), prompts=(1, 2)))
    works = [prompt(range(n, n + 40)) for n in (0, 100)] + [prompt(range(300, 320))]
    follower = prompt([*range(30), 7, 8, 9])
    assert scheduler.next_group([works[2], works[0]], partial=False) == []
    assert scheduler.next_group([works[2], works[0]], partial=True) == [works[2]]
    assert scheduler.next_group([works[2], works[0], follower, works[1]], partial=True) == works[:2]
    for work in (works[2], works[0], works[1]):
        scheduler.admit(work)
    assert scheduler.next_group([follower], partial=True) == []  # until its prefix is in a slot
    assert scheduler.next_prefill().works == [works[2]]
    assert scheduler.next_prefill(fullest=True).works == works[:2]
    scheduler.prefilled(scheduler.next_prefill(fullest=True))
    assert scheduler.next_group([prompt(range(500, 540)), follower], partial=False) == [follower]


def test_answers_grow_together_in_the_smallest_program_that_holds_them():
    scheduler = Scheduler(BUCKETS)
    works = [prompt(range(n, n + 600)) for n in (0, 1000)]
    scheduler.admit(works[0])
    advance(scheduler, works[0])
    one = scheduler.next_decode()
    assert (one.rows, one.window, one.steps) == (1, 1040, STEPS)
    scheduler.admit(works[1])
    assert scheduler.next_decode().steps == STEPS_BETWEEN_CHUNKS
    advance(scheduler, works[1])
    both = scheduler.next_decode()
    assert both.rows == 3 and both.works == works
    scheduler.decoded(works[0], [7, 8, 9])
    assert works[0].cached == 603 and works[0].tokens == [1000, 7, 8, 9]
    assert scheduler.slots[works[0].slot].keys[600:].tolist() == [1000, 7, 8]  # the newest token is in no cache yet


def finish(scheduler, keys, tokens=()):
    """A work that was answered; its slot."""
    work = prompt(keys)
    admission = scheduler.admit(work)
    advance(scheduler, work)
    scheduler.decoded(work, list(tokens))
    scheduler.release(work)
    return admission


def test_a_chat_goes_on_in_its_slot():
    scheduler = Scheduler(BUCKETS)
    image = [image_key(b"a" * 16, 36)] * 50
    first = finish(scheduler, [7, 8, *image, 9], [5, 2])
    other = finish(scheduler, range(100, 140))
    assert other.slot != first.slot
    again = scheduler.admit(prompt([7, 8, *image, 9, 1000, 5, 6, 4]))
    assert (again.slot, again.shared, again.source) == (first.slot, 55, None)
    # Seen at another granularity, an image shares nothing.
    assert scheduler.admit(prompt([7, 8, *[image_key(b"a" * 16, 72)] * 50, 9])).shared == 0


def test_a_shared_beginning_is_copied_and_the_oldest_slot_goes():
    scheduler = Scheduler(BUCKETS)
    system = list(range(20))
    first = finish(scheduler, [*system, *range(100, 160)])
    second = finish(scheduler, [*system, *range(200, 260)])
    assert (second.shared, second.source) == (20, first.slot) and second.slot != first.slot
    third = finish(scheduler, range(300, 340))
    assert {first.slot, second.slot, third.slot} == {0, 1, 2}
    running = prompt([*system, *range(400, 460)])
    fourth = scheduler.admit(running)
    assert (fourth.slot, fourth.shared) == (first.slot, 20)  # the oldest is taken, and begins as the prompt does itself
    fifth = scheduler.admit(prompt([*system[:18], 1, 1]))
    assert (fifth.slot, fifth.shared, fifth.source) == (second.slot, 18, None)
    # Of a prompt that is cached as a whole the last position is read again.
    assert scheduler.admit(prompt(range(300, 340))).shared == 39
    assert scheduler.admit(prompt([1])) is None


def test_a_prompt_waits_for_one_that_is_read_and_begins_as_it_does():
    scheduler = Scheduler(BUCKETS)
    image = [image_key(b"a" * 16, 36)] * 100
    first, second = prompt([7, *image, 8, 9]), prompt([7, *image, 8, 5])
    assert scheduler.admit(first).shared == 0
    assert scheduler.admit(second) is None
    assert scheduler.admit(prompt([7, image_key(b"a" * 16, 72), 9])).shared == 0  # shares too little to wait
    while first in scheduler.prefilling:
        assert scheduler.admit(second) is None
        scheduler.prefilled(scheduler.next_prefill())
    assert scheduler.admit(second).shared == 102


def test_what_was_given_up_keeps_what_was_read():
    scheduler = Scheduler(BUCKETS)
    work = prompt(range(200))
    scheduler.admit(work)
    scheduler.prefilled(scheduler.next_prefill())
    scheduler.release(work)
    assert scheduler.next_prefill() is None and scheduler.next_decode() is None
    assert scheduler.admit(prompt(range(200))).shared == 64


def tiles(count, value):
    return np.full((count, 2, 2, 3), value, np.uint8)


def test_pages_are_shared_and_the_longest_unused_image_goes():
    pages = ImagePages(6)
    a, b, c = (("a", tiles(3, 1)), ("b", tiles(2, 2)), ("c", tiles(2, 3)))
    (of_a,), (again, of_b) = pages.acquire([a]), pages.acquire([a, b])
    assert again == of_a and len({*of_a, *of_b}) == 5
    assert (pages.hits, pages.misses) == (1, 2)
    _, missing = pages.missing(4)
    assert list(missing) == [*of_a, of_b[0]] and missing[of_b[0]][0, 0, 0] == 2
    pages.encoded(missing)
    assert pages.ready("a") and not pages.ready("b")
    assert pages.acquire([c]) is None  # everything is in use
    pages.release("a")
    assert pages.acquire([c]) is None
    pages.release("ab")  # b was not encoded yet: nobody waits for it, so it is forgotten, and a is kept
    assert pages.missing(9) == (0, {})
    (of_c,) = pages.acquire([c])
    assert not {*of_c} & {*of_a}
    pages.acquire([a])
    assert (pages.hits, pages.misses) == (2, 3)
    assert pages.acquire([("d", tiles(2, 4))]) is None
    pages.release("a")
    assert {*pages.acquire([("d", tiles(4, 4))])[0]} == set(range(6)) - {*of_c}  # a went


def test_an_image_is_known_by_its_pixels_and_its_size():
    one = tiles(3, 7)
    assert digest_of(one, (5, 4)) == digest_of(one.copy(), (5, 4))
    other = one.copy()
    other[2, 1, 1, 2] += 1
    assert len({digest_of(one, (5, 4)), digest_of(one, (4, 5)), digest_of(other, (5, 4))}) == 3


def test_places_in_the_pool(tiny):
    """The docstring's example, with this model's R = 28."""
    index = np.array([0, 1, 3, 3 + 28, 3 + 2 * 28, 2])
    ids, places = places_of(tiny, index, np.array([7, 8, 9]), [4, 2], 10)
    assert ids.tolist() == [7, 8, 0, 0, 0, 9]
    assert places.tolist() == [-1, -1, 4 * 28, 2 * 28, 10 * 28, -1]


def test_on_several_lanes_every_program_takes_all_slots():
    scheduler = Scheduler(server_buckets(ModelConfig(), slots=3, chunk=64, pages=20, batch_shards=2))
    works = [prompt(range(n, n + 30)) for n in (0, 100, 200)]
    for work in works:
        scheduler.admit(work)
    prefill = scheduler.next_prefill()
    assert prefill.works == works and (prefill.prompts, prefill.chunk, prefill.window) == (3, 64, 0)


def test_keys_of_images_are_negative_and_their_own():
    keys = {image_key(digest * 16, g) for digest in (b"a", b"b", b"\xff") for g in (36, 72, 576)}
    assert len(keys) == 9 and all(-(2**63) <= key < 0 for key in keys)


def drafted(length, draft):
    """A work whose prompt keys are 100, 101, ... and whose draft is 0, 1, ..."""
    work = prompt([*range(100, 100 + length), *range(draft)])
    work.draft, work.limit = draft, 1000
    return work


def test_every_position_of_a_draft_predicts_once():
    """Prompts and drafts of all lengths, drafts that agree to some place, in the programs that are compiled."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        length, draft, chunk = int(rng.integers(1, 300)), int(rng.integers(1, 100)), int(rng.choice([16, 64, 256]))
        buckets = server_buckets(ModelConfig(), slots=2, chunk=chunk, pages=20)
        scheduler, work = Scheduler(buckets), drafted(length, draft)
        scheduler.admit(work)
        agreed, asked = int(rng.integers(0, draft + 1)), 0
        while work in scheduler.prefilling:
            before = work.cached
            prefill = scheduler.next_prefill()
            assert (1, prefill.chunk, prefill.window, prefill.predicted) in buckets.prefills
            (start,), (size,), (count,) = prefill.starts, prefill.lengths, prefill.predicts
            assert start == before and 0 < size <= prefill.chunk and count <= prefill.predicted
            scheduler.prefilled(prefill)
            assert count == max(0, work.cached - max(before, length - 1))
            if count:
                tokens = [n if n < agreed else 999 for n in range(asked, asked + count)]
                scheduler.predicted(work, tokens)
                asked += count
        assert work.tokens == [*range(agreed), 999] and work in scheduler.decoding
        assert work.cached == length + agreed
        assert scheduler.slots[work.slot].keys.tolist() == [*range(100, 100 + length), *range(agreed)]


def test_a_prompt_that_is_packed_again_keeps_its_slot_and_the_text_in_front():
    scheduler = Scheduler(BUCKETS)
    work, other = prompt([*range(40), *[-4] * 20, 9]), prompt(range(500, 540))
    scheduler.admit(work), scheduler.admit(other)
    advance(scheduler, work)
    scheduler.decoded(work, [5, 6])
    work.keys = np.array([*range(40), *[-16] * 80, 9, 1000, 5], np.int64)
    work.draft = 2
    again = scheduler.readmit(work)
    assert (again.slot, again.shared, again.source) == (work.slot, 40, None)
    assert work.tokens == [] and work.cached == 40 and work in scheduler.prefilling and work not in scheduler.decoding
