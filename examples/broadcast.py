"""A video to a streaming server, live: frames go into ffmpeg, which sends them by RTMP, SRT or UDP.

    python examples/broadcast.py --bundle bundle --to rtmp://localhost/live/key
    python examples/broadcast.py --bundle bundle --to "srt://localhost:9000?mode=caller"

Chunks are made as fast as the machine can. Where that is faster than they are shown, ffmpeg (-re) reads no
faster than it sends, the pipe fills, and the video waits.
"""

import argparse
import shutil
import subprocess

from forcingkv.runtime import InputError, Session

PROMPT = "a 3 moving left and a 7 moving up"
CONTAINERS = {"rtmp": "flv", "rtmps": "flv", "srt": "mpegts", "udp": "mpegts"}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--bundle", required=True)
parser.add_argument("--to", required=True)
parser.add_argument("--chunks", type=int, help="default: without end, until Ctrl-C")
parser.add_argument("--ffmpeg", default="ffmpeg")
given = parser.parse_args()

scheme = given.to.partition(":")[0]
if scheme not in CONTAINERS:
    parser.error(f"--to {given.to}: expected an address that begins with {', '.join(CONTAINERS)}")
if shutil.which(given.ffmpeg) is None:
    parser.error(f"--ffmpeg {given.ffmpeg}: there is no such program")
try:
    session = Session.open(given.bundle)
    video = session.generate(PROMPT, seed=7, chunks=given.chunks)
except InputError as error:
    parser.error(str(error))

with session:
    width, height = session.bundle.manifest.frame_size
    words = [given.ffmpeg, "-loglevel", "error", "-re", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    words += ["-s", f"{width}x{height}", "-r", f"{session.spec.fps:g}", "-i", "-"]
    # No B-frames and a keyframe every two seconds: who joins sees a picture soon, and nothing is held back.
    words += ["-c:v", "libx264", "-preset", "veryfast", "-tune", "zerolatency", "-pix_fmt", "yuv420p"]
    words += ["-g", f"{round(2 * session.spec.fps)}", "-f", CONTAINERS[scheme], given.to]
    ffmpeg = subprocess.Popen(words, stdin=subprocess.PIPE)
    assert ffmpeg.stdin
    sent, ended = 0, 0
    try:
        for chunk in video:
            ffmpeg.stdin.write(chunk.frames)
            sent += len(chunk.frames)
        ffmpeg.stdin.close()
    except BrokenPipeError:
        print("ffmpeg ended: its message is above")
        ended = 1
    except KeyboardInterrupt:
        ffmpeg.terminate()
        ended = 130
    print(f"{sent} frames sent")
    raise SystemExit(ended or ffmpeg.wait())
