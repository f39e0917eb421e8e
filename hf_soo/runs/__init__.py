"""A recorded run of any task: flags, resume, record, report."""
