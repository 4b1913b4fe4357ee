"""Conversion of files of images and other media to arrays. Imports no other room."""
