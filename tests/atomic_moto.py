"""moto with conditional writes in one step, as a store has them: `python tests/atomic_moto.py -H 127.0.0.1 -p 5000`.

moto looks for a key and writes it in two steps, so that of racing writers two may win: in 2 of 150 rounds of
four processes, and in none with the lock.
"""

import threading

from moto.s3.responses import S3Response
from moto.server import main

LOCK = threading.Lock()
put_object = S3Response.put_object


def put_in_one_step(response: S3Response) -> object:
    with LOCK:
        return put_object(response)


S3Response.put_object = put_in_one_step  # pyrefly: ignore[bad-assignment]

if __name__ == "__main__":
    main()
