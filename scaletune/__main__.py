"""`python -m scaletune`."""

from scaletune.cli import main

raise SystemExit(main())
