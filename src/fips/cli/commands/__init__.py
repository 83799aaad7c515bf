"""One function per subcommand: its options, the call that does the work, and the printing of its result.

What does the work is imported when it is called, so that ``--help`` stays quick. The order of the imports here is that
of the panels in ``fips --help``.
"""

from fips.cli.commands import compressing, looking, measuring  # each adds its commands to the app

__all__ = ["compressing", "looking", "measuring"]
