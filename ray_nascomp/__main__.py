"""`python -m ray_nascomp`: the command `ray-nascomp`."""

from ray_nascomp.cli import main

main(prog_name="ray-nascomp")
