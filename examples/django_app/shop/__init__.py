"""An application whose users are billed."""
