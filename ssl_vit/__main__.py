"""`python -m ssl_vit COMMAND` is `ssl-vit COMMAND`; for `torchrun -m ssl_vit eval ...`."""

from ssl_vit.cli import main

main()
