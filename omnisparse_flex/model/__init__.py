"""What ``apply_omnisparse`` installs in a model."""
