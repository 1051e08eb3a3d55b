"""Suites: measures of a model beside the nll of held-out text, a file each."""
