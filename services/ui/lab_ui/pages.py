"""The table of pages: file, icon and section of each, in the order of the navigation. The first page is at /."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Page:
    """`section`: key of a text below nav.sections."""

    name: str  # of its file in app_pages, of its texts file, and of its title in nav.yaml
    icon: str
    section: str

    @property
    def file(self) -> str:
        """Path relative to this file, as AppTest.switch_page takes it."""
        return f"app_pages/{self.name}.py"

    @property
    def url_path(self) -> str:
        """Path of the page's URL. Streamlit does not use that of the first page, which is at /."""
        return self.name


PAGES = (
    Page("start", "home", "start"),
    Page("chat", "chat", "start"),
    Page("tokens", "grid_view", "inside"),
    Page("next_token", "bar_chart", "inside"),
    Page("tasks", "checklist", "inside"),
    Page("tools", "build", "inside"),
    Page("cache", "bolt", "measure"),
    Page("limits", "speed", "measure"),
    Page("load", "stacked_line_chart", "measure"),
    Page("status", "monitor_heart", "run"),
)
