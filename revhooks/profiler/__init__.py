"""Measuring a step: meters, and the tracker that makes a `revhooks.record.Report`."""
