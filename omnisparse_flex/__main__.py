"""``python -m omnisparse_flex``: the command line without an installed script."""

from omnisparse_flex.cli import main

raise SystemExit(main())
