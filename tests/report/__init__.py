"""Tests of the report: pictures, page, model card, terminal table and files."""
