"""The one exception for what a user can put right.

Every message names the thing, the rule, the value received and the remedy. The command line shows it as one
line without a traceback; in Python it is a ``ValueError``.
"""


class UserError(ValueError):
    """Bad input or a bad setting: a missing file, a broken image, a checkpoint of another model."""
