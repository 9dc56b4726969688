"""The pages as Streamlit scripts: they draw and hold session state; the logic is in the modules next to app.py."""
