"""Stands in for compute-sanitizer and ncu in the stub: runs the command behind the options, and counts what it reports."""

from __future__ import annotations

import subprocess
import sys


def main() -> int:
    arguments = iter(sys.argv[1:])
    command = [next(argument for argument in arguments if not argument.startswith("-")), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    errors = sum(line.startswith("========= Invalid") for line in done.stdout.splitlines())
    print(f"{done.stdout}========= ERROR SUMMARY: {errors} errors")
    return done.returncode or int(errors > 0)


if __name__ == "__main__":
    sys.exit(main())
