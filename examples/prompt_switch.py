"""Several prompts in one video.

    python examples/prompt_switch.py --bundle bundle --switch 4 "a 1 moving right and a 5 moving down"

`--switch CHUNK PROMPT` may be given several times. Prints which prompt rules each chunk, and at each switch
the first chunk that follows the new prompt: on a CPU the one asked for; on a GPU chunks may have been begun
already, and it is a later one.
"""

from __future__ import annotations

import argparse

from forcingkv.runtime import Session


def main() -> None:
    """Generate a video whose prompt changes."""
    parser = argparse.ArgumentParser(description="Several prompts in one video.")
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--prompt", default="a 3 moving left and a 7 moving up", help="the first one")
    parser.add_argument("--switch", nargs=2, action="append", default=[], metavar=("CHUNK", "PROMPT"))
    parser.add_argument("--no-recache", action="store_true", help="keep the cache as it is")
    parser.add_argument("--chunks", type=int, default=8)
    options = parser.parse_args()
    switches = sorted((int(chunk), prompt) for chunk, prompt in options.switch)

    with Session.open(options.bundle) as session:
        video = session.generate(options.prompt, seed=7, chunks=options.chunks)
        rules = {0: options.prompt}  # first chunk -> prompt
        for chunk in video:
            print(f"chunk {chunk.index}: {rules[max(first for first in rules if first <= chunk.index)]}")
            while switches and switches[0][0] <= video.index:  # the chunk that comes next
                _, prompt = switches.pop(0)
                first = video.switch(prompt, recache=not options.no_recache)
                rules[first] = prompt
                print(f"switched: from chunk {first} on: {prompt}")


if __name__ == "__main__":
    main()
