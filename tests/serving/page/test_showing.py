"""How the page shows what it is told, and itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect


@pytest.mark.parametrize("view", ["words", "tokens"])
def test_words_of_models_are_text_and_never_html(
    page: Page, server: Any, view: str, send: Any, words: Any
):
    send("html")
    expect(words()).to_have_text(server.evil)
    if view == "tokens":
        page.get_by_role("button", name="Tokens").click()
        page.locator("#chat .token").first.click()
        expect(page.locator("#chat .choices")).to_contain_text("<script>")
    assert page.locator("#chat .reply img, #chat .reply script").count() == 0
    page.wait_for_timeout(100)
    assert page.title() == "instar"


def test_the_policy_runs_no_script_but_the_pages_own(page: Page):
    blocked: list[str] = []
    page.on("console", lambda message: blocked.append(message.text))
    page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "document.title = 'owned'";
            document.body.append(script);
        }"""
    )
    page.wait_for_timeout(100)
    assert page.title() == "instar"
    assert any("Content Security Policy" in text for text in blocked)


MARKDOWN = [
    ("47 + 38 = 85.", "<p>47 + 38 = 85.</p>"),
    ("3*4*5, a_b_c, 2 * 3 * 4", "<p>3*4*5, a_b_c, 2 * 3 * 4</p>"),
    ("这是**重点**，*斜*，`x`", "<p>这是<strong>重点</strong>，<em>斜</em>，<code>x</code></p>"),
    ("***x*** __y__ ~~z~~ \\*w\\*",
     "<p><strong><em>x</em></strong> <strong>y</strong> <del>z</del> *w*</p>"),
    ("Do:\n1. a\n2. b\n   - c\n\n   d\n\nDone",
     '<p>Do:</p><ol start="1"><li>a</li><li>b<ul><li>c</li></ul><p>d</p></li></ol><p>Done</p>'),
    ("It was in\n1984. Then", "<p>It was in\n1984. Then</p>"),
    ("```python\n# x *y* z\n```\nso", '<pre tabindex="0"><code># x *y* z</code></pre><p>so</p>'),
    ("~~~\nopen", '<pre tabindex="0"><code>open</code></pre>'),
    ("# Title\ntext\n> said\n---",
     "<h3>Title</h3><p>text</p><blockquote><p>said</p></blockquote><hr>"),
    ("so:\n| a | b |\n|--|-:|\n| 1 | `2` |",
     '<p>so:</p><div class="wide"><table><tbody><tr><th>a</th>'
     '<th style="text-align: end;">b</th></tr>'
     '<tr><td>1</td><td style="text-align: end;"><code>2</code></td></tr></tbody></table></div>'),
    ("## Title with C# ##\n# C#", "<h4>Title with C#</h4><h3>C#</h3>"),
    ("a | b\nis none", "<p>a | b\nis none</p>"),
    ("[x](javascript:alert(1)) ![y](z)", "<p>[x](javascript:alert(1)) ![y](z)</p>"),
    ("<b>&amp;</b>", "<p>&lt;b&gt;&amp;amp;&lt;/b&gt;</p>"),
    ("see https://a.example/b.", '<p>see <a href="https://a.example/b" title="https://a.example/b" '
     'target="_blank" rel="noopener noreferrer">https://a.example/b</a>.</p>'),
    ("**open and `open", "<p>**open and `open</p>"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "html"), MARKDOWN)
def test_markdown_is_shown_as_it_is_meant(page: Page, text: str, html: str):
    written = """(text) => {
        const whole = document.createElement("div");
        new Growing(whole).show(text);
        const grown = document.createElement("div"), growing = new Growing(grown);
        for (let end = 0; end <= text.length; end++) growing.show(text.slice(0, end));
        const plain = (e) => e.innerHTML.replaceAll(' class=""', "");
        return [plain(whole), plain(grown)];
    }"""
    assert page.evaluate(written, text) == [html, html]


MANY, ENDLESS = 300_000, 2_000_000
"""Work that grows with the length of these takes a moment, and with its square, too long."""

OPENED = ["**a ", "_a", "[a", "*"]
PIECES = ["a `", "~~a", "> ", "  - a\n", "|\n|-"]
BEFORE_SPACES = ["# a", "# a #", "```", "~~~ a", "---", "- ", "1.", ">"]
IN_TABLES = ["", "|", "|-", "|-|", "|-|-"]


@pytest.mark.parametrize(
    ("before", "repeated", "times", "after"),
    [
        *[("", text, MANY, "") for text in OPENED],
        *[("", text, 8000, "") for text in PIECES],
        *[(text, " ", ENDLESS, "b") for text in BEFORE_SPACES],
        *[(f"|\n{text}", " ", ENDLESS, "b|") for text in IN_TABLES],
        ("# ", "#", ENDLESS, " b"),
    ],
)
def test_no_markdown_takes_for_ever(page: Page, before: str, repeated: str, times: int, after: str):
    text = f"{json.dumps(before)} + {json.dumps(repeated)}.repeat({times}) + {json.dumps(after)}"
    session = page.context.new_cdp_session(page)
    # No measure, but an end to the waiting.
    wanted = {"expression": f"void markdown({text})", "timeout": 120_000}
    assert "exceptionDetails" not in session.send("Runtime.evaluate", wanted)


def test_tokens_show_their_probability_and_alternatives_by_keyboard(
    page: Page, send: Any, words: Any
):
    send("hello")
    expect(words()).to_contain_text("Bye")
    button = page.get_by_role("button", name="Tokens")
    button.press("Enter")
    assert button.get_attribute("aria-pressed") == "true"
    tokens = page.locator("#chat .token")
    expect(tokens).to_have_count(4)
    assert tokens.nth(1).get_attribute("aria-label") == " says 60.0 %"
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    rows = page.locator("#chat .choices tr")
    assert rows.nth(0).inner_text().split() == ["␣says", "60.0", "%"]
    assert rows.nth(1).inner_text().split() == ["␣other", "30.0", "%"]
    assert rows.nth(0).get_attribute("class") == "drawn"
    page.keyboard.press("End")
    expect(tokens.nth(3)).to_be_focused()
    button.press("Enter")
    expect(words()).to_have_text("sft says hello.\nBye")


def test_a_character_in_pieces_is_shown_where_it_is_complete(page: Page, send: Any, words: Any):
    send("中")
    expect(words()).to_have_text("龄。")
    page.get_by_role("button", name="Tokens").click()
    assert page.locator("#chat .token").all_inner_texts() == ["·", "龄", "。"]
    page.locator("#chat .token").nth(1).click()
    rows = [row.split() for row in page.locator("#chat .choices tr").all_inner_texts()]
    assert rows == [["龄", "90.0", "%"], ["龅", "10.0", "%"]]


def test_the_language_is_the_browsers_and_can_be_changed(browser: Browser, server: Any):
    context = browser.new_context(locale="zh-CN")
    page = context.new_page()
    page.goto(server.url)
    expect(page.get_by_role("button", name="发送")).to_be_visible()
    assert page.get_attribute("html", "lang") == "zh-CN"
    page.fill("#chat textarea", "hello")
    page.press("#chat textarea", "Enter")
    expect(page.get_by_role("button", name="词元")).to_be_visible()
    page.get_by_role("button", name="English").click()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(page.get_by_role("button", name="Tokens")).to_be_visible()
    page.reload()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    context.close()


def test_a_long_reply_keeps_its_end_in_view_unless_one_reads_above(
    page: Page, send: Any, words: Any
):
    send("many")
    expect(words()).to_contain_text("line 79")
    place = "() => { const l = document.querySelector('#chat .log');"
    assert page.evaluate(place + "return l.scrollHeight - l.scrollTop - l.clientHeight }") < 80
    page.evaluate(place + "l.scrollTop = 0 }")
    expect(page.get_by_role("button", name="Newest")).to_be_visible()
    page.get_by_role("button", name="Newest").click()
    expect(page.get_by_role("button", name="Newest")).to_be_hidden()
    assert page.evaluate("() => document.documentElement.scrollHeight <= innerHeight")


def test_the_report_is_shown_and_may_run_nothing(page: Page):
    page.get_by_role("tab", name="Report").click()
    frame = page.frame_locator("#report iframe")
    frame.get_by_text("down").click()
    expect(frame.get_by_text("The end")).to_be_in_viewport()
    assert page.title() == "instar"
    page.select_option("#report .model", "lone")
    expect(page.locator("#report .note")).to_contain_text("No report lies beside")


def test_thoughts_are_folded(page: Page, send: Any, words: Any):
    send("think")
    expect(words()).to_contain_text("Bye")
    thought = page.locator("#chat .thought")
    expect(thought.locator(".words")).to_be_hidden()
    thought.locator("summary").click()
    expect(thought.locator(".words")).to_have_text("Hm.")


def test_tabs_are_reached_by_arrow_keys_and_every_field_has_a_name(page: Page):
    page.get_by_role("tab", name="Chat").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Side by side")).to_be_focused()
    expect(page.locator("#compare")).to_be_visible()
    page.get_by_role("button", name="Settings").click()
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("input, select, textarea, button")]
            .filter((e) => !(e.labels?.length && e.labels[0].textContent.trim())
                && !e.ariaLabel && !e.textContent.trim()).map((e) => e.outerHTML)"""
    )
    assert unnamed == []


@pytest.mark.parametrize("width", [320, 390, 768, 1440])
def test_nothing_is_wider_than_the_window(page: Page, width: int, send: Any, words: Any):
    page.set_viewport_size({"width": width, "height": 700})
    for panel, tab in (("#chat", "Chat"), ("#compare", "Side by side")):
        page.get_by_role("tab", name=tab).click()
        send("w" * 300, panel)
        expect(words(panel)).to_contain_text("Bye")
        assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
        inside = "(log) => log.scrollWidth <= log.clientWidth"
        assert page.locator(f"{panel} .log").evaluate(inside)
