"""Stress test of the engine: python -m launch.bench.stress --requests=1000

Sends random requests, some of them malformed or cancelled. Fails if a request does not end as expected, if anything is
compiled after the warm-up, or if arrays are left on the device.
"""

from absl import flags

from avg_llava_jax.commands import cli

REQUESTS = flags.DEFINE_integer("requests", 1000, "How many in all.", lower_bound=1)
IN_FLIGHT = flags.DEFINE_integer("in_flight", 32, "How many at once.", lower_bound=1)
SLOTS = flags.DEFINE_integer("slots", 8, "How many of them have a slot.", lower_bound=1)
LARGEST = flags.DEFINE_integer("largest", 800, "Longest side of a picture, in pixels.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of everything random.", lower_bound=0)


def main() -> None:
    from avg_llava_jax.inference.engine import Engine
    from avg_llava_jax.inference.stress import stress

    engine = Engine(cli.load_model(), slots=SLOTS.value, queue=IN_FLIGHT.value)
    engine.warm_up()
    engine.start()
    report = stress(engine, REQUESTS.value, IN_FLIGHT.value, SEED.value, LARGEST.value, progress=True)
    engine.close()
    stats = engine.stats()
    ended = ", ".join(f"{count} {how}" for how, count in sorted(report.outcomes.items()))
    print(f"{REQUESTS.value} requests in {report.seconds:.1f} s: {ended}")
    print(f"{stats.tokens} tokens; granularities {stats.granularities}; {stats.image_hits} images and")
    print(f"{stats.prefix_tokens} prompt positions were there already; {report.compilations} compilations")
    print(f"memory since the first quarter: {report.host_bytes:+} bytes; left on the device: {report.device_bytes:+}")
    if report.wrong:
        raise RuntimeError(f"{len(report.wrong)} ended wrongly: {'; '.join(report.wrong[:3])}")
    if report.compilations or report.device_bytes:
        raise RuntimeError(f"{report.compilations} programs compiled, {report.device_bytes} bytes left on the device")


if __name__ == "__main__":
    cli.run(main, required=[])
