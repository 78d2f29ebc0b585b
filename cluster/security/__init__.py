"""Who may call, how much, and over what: tokens, limits, certificates, the audit log."""
