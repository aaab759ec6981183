"""What is measured for REPORT.md, README.md and docs/io_uring.md, and how it is written down."""
