"""Bundles as a service: live sessions over WebSockets, jobs over HTTP, and a page."""
