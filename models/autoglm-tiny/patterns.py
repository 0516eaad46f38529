"""The sentences that AutoGLM-tiny is taught with, one grammar line for a family of patterns.

A line begins with flags and a space. ``!`` holds the line out of training; ``&`` marks a clause
that may be a part of a longer task; ``=`` takes no polite words around it; ``.`` is none of these.
``<a|b>`` is a choice: a line stands for every combination of its choices. ``{slot}`` is filled from
:mod:`vocabulary`. English lines are written in lower case; the generator capitalises.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_CHOICE = re.compile(r"<([^<>]*)>")

# How a place on the screen is said; ``{at}`` in a line stands for one of them.
_PLACES = {
    "zh": "<({x},{y})|[{x},{y}]|坐标({x},{y})|坐标[{x}, {y}]|({x}, {y})>",
    "en": "<({x},{y})|[{x},{y}]|({x}, {y})|position ({x},{y})|point [{x}, {y}]>",
}

# fmt: off
# Grammar lines stay several to a line.
GRAMMAR: dict[tuple[str, str], tuple[str, ...]] = {
    ("Launch", "zh"): (
        "& <打开|启动|进入|运行>{app}", "& 把{app}<打开|启动>", ". <打开|启动|运行>一下{app}",
        ". <打开|启动|进入><手机上的|应用|软件|我的>{app}",
        "= 我<想|要|想要|需要><用|使用|打开|进入>{app}",
        "= <能不能|可以|能><帮我|><打开|启动>{app}吗", ". <点开|切换到|跳转到|去>{app}",
        ". 去{app}<看看|看一下>", ". <打开|进入>{app}<应用|软件|程序>", ". 把{app}<开|运行>一下",
        "= {app}<打开|开一下>", ". 让{app}<运行|启动>起来", "= 打开手机，<进入|启动>{app}",
        "! {app}<启动|运行>一下", "! 把手机上的{app}<打开|启动>",
        "!= 我现在<想|要><启动|进入>{app}", "!& <打开|启动>我手机里的{app}",
        "!= 能<打开|进入>一下{app}吗",
    ),
    ("Launch", "en"): (
        "& <open|launch|start|run> {app}", "& <open|launch|start> the {app} app",
        ". <open|start|launch> {app} <app|on my phone|for me>",
        "= i <want|need> to <open|use> {app}", "= <can|could|will> you <open|start|launch> {app}?",
        ". <go|switch|jump> to {app}", ". bring up {app}", ". take me to {app}",
        ". get {app} <open|running>", "= let's <use|open> {app}", ". show me {app}",
        "= i would like to <use|open> {app}", ". <open|start> my {app}", "= {app}, <open|start> it",
        "! <launch|run> my {app} app", "!& <run|start> {app} on the phone",
        "!= i want you to <launch|start> {app}", "!= can you <run|use> the {app} app for me?",
    ),
    ("Tap", "zh"): (
        "& <点击|轻触|点按|点一下>{at}", ". <点击|点一下>屏幕上的{at}",
        ". 点击{at}<的按钮|这个位置|处>", ". 在{at}<点击|点一下>", "& 点击{at}<确认|进行>{risk}",
        ". 点{at}这个按钮<确认|进行>{risk}", "= 我<想|要>点击{at}", ". 点击{x},{y}",
        "! <轻触|点按>屏幕上的{at}", "! 在{at}<轻触|点按>一下", "!& 点一下{at}这个位置",
        "! 点击屏幕上的{at}确认{risk}",
    ),
    ("Tap", "en"): (
        "& <tap|click|press|touch> {at}", ". <tap|click> on {at}",
        ". tap the <button|icon|screen> at {at}", ". at {at} <tap|click>",
        "& tap {at} to confirm <the|> {risk}",
        ". click the button at {at} <for|to confirm> the {risk}", "= i want to tap {at}",
        ". tap {x},{y}", "! <touch|press> the icon at {at}", "! click on the screen at {at}",
        "!& touch on {at}", "! press the button at {at} to confirm the {risk}",
    ),
    ("Type", "zh"): (
        ". <输入|打字|键入>{text}", "& <输入|填写>“{text}”",
        ". 在<搜索框|输入框>里<输入|填写>{text}", ". 在输入框<输入|填上>“{text}”",
        ". 输入文字：{text}", ". 把“{text}”<输入|填到>搜索框", ". 输入内容{text}",
        ". <输入|写>：{text}", "= 我要输入{text}", ". 填写文字“{text}”",
        "! 在<搜索框|输入框>里写：{text}", "!& 把“{text}”填到输入框里", "! 填写内容{text}",
    ),
    ("Type", "en"): (
        ". <type|enter|input> {text}", "& <type|enter> \"{text}\"",
        ". <type|enter> \"{text}\" <in|into> the <search box|text box>",
        ". in the <search box|text box> type {text}", ". type the <text|words>: {text}",
        ". <write|type>: {text}", "= i want to type {text}", ". fill in \"{text}\"",
        ". put \"{text}\" in the text box",
        "! in the text box <enter|write> {text}", "!& write \"{text}\" in the search box",
        "! enter the text: {text}",
    ),
    ("Type_Name", "zh"): (
        "& 输入<姓名|名字|联系人>{name}", ". 填写<姓名|名字|联系人>{name}",
        ". 在姓名<栏|框>里<输入|填写>{name}", ". 姓名<填|写|输入>{name}", ". 输入人名：{name}",
        ". 把名字{name}<填上|写上>", ". 联系人<填|写>{name}", "! 名字<填|写>{name}",
        "!& 在名字栏里填写{name}", "! 把姓名{name}<输入|填>上",
    ),
    ("Type_Name", "en"): (
        "& <type|enter> the <name|contact> {name}", ". enter the <contact name|full name> {name}",
        ". fill in the name {name}", ". in the name <box|field> <type|enter> {name}",
        ". put {name} as the <name|contact name>", ". the <name|contact> is {name}, type it",
        ". set the name to {name}",
        "! fill in the contact name {name}", "!& type the full name {name}",
        "! the contact name is {name}, enter it",
    ),
    ("Interact", "zh"): (
        "& <有|遇到>多个<选项|结果|商品><时|就>问我", ". <让|请>我来<选|选择|决定>",
        "& 问我<选|要>哪一个", "= 我来<选择|决定><哪一个|用哪个>", ". 让用户<选择|决定>",
        ". 把选项给我<选|看>", "= 选项太多了，问我", ". 先问我<再选|再决定>", "! 把结果给我选",
        "!& 让我<选择|决定>哪一个", "!= 结果太多了，让我选",
    ),
    ("Interact", "en"): (
        "& ask me which <one|option|item> to <take|choose>", ". let me <choose|decide|pick>",
        ". let the user <choose|decide>", "= i will <choose|decide|pick> <one|myself>",
        ". ask me <first|before you choose>", "& show me the options",
        "= there are <many|several> options, ask me",
        "! let me pick one of the options", "!& ask me which result to pick",
        "!= there are several items, let me choose",
    ),
    ("Swipe", "zh"): (
        "& <从|由>{at}<滑动|滑|拖动>到({u},{v})", ". 从[{x},{y}]<滑到|滑动到|拖到>[{u},{v}]",
        ". 手指从({x},{y})<滑到|滑动到>({u},{v})", "& <向|往>{dir}<滑动|滑|划>",
        ". 把页面<向|往>{dir}<滑|拉>", ". 屏幕<向|往>{dir}滑动", ". <向|往>{dir}<滑|划>一下",
        ". 在屏幕上从{x},{y}滑到{u},{v}", "! 在屏幕上从({x},{y})拖到({u},{v})",
        "!& 由[{x},{y}]滑到[{u},{v}]", "! 手指<向|往>{dir}<滑动|划>",
    ),
    ("Swipe", "en"): (
        "& <swipe|slide|drag> from {at} to ({u},{v})", ". <swipe|drag> from [{x},{y}] to [{u},{v}]",
        ". move the finger from ({x},{y}) to ({u},{v})", "& <swipe|slide> {dir}",
        ". swipe the <page|screen> {dir}", ". swipe {dir} <once|a bit>",
        ". swipe {x},{y} to {u},{v}", ". slide the page {dir}",
        "! slide the finger from [{x},{y}] to [{u},{v}]",
        "!& drag the screen from ({x},{y}) to ({u},{v})", "! slide the screen {dir} once",
    ),
    ("Note", "zh"): (
        "& <记录|记下|保存><当前|这个>页面", ". <记录|记下>页面<内容|信息>",
        ". 把<当前|这个>页面<记录|记>下来", ". 做<一个|>笔记", ". 记录一下<这里|这个>",
        "& 把内容记下来", "! 把页面信息<记录|保存>下来", "!& 记录当前内容",
        "! 记下<这个|当前>页面的信息",
    ),
    ("Note", "en"): (
        "& <note|record|save> <this|the current> page", ". <note|write> down <this|the> page",
        ". make a note <of this page|here|>", ". take a note <of this|>", ". take notes",
        "& remember this page", ". note the <content|information>",
        "! make a note of the current page", "!& record the content of this page",
        "! write down the information",
    ),
    ("Call_API", "zh"): (
        ". 调用<接口|API|模型>{task}", ". 用<接口|API|模型>{task}", "& 调用接口“{task}”",
        ". <请求|让>模型{task}", ". 通过<接口|API>{task}", ". 调用API：{task}",
        ". 使用<接口|模型>{task}", "! 通过模型{task}", "!& 用API“{task}”", "! 请求接口：{task}",
    ),
    ("Call_API", "en"): (
        ". call the <api|model> to {task}", ". use the <api|model> to {task}",
        "& call the api \"{task}\"", ". ask the <api|model> to {task}", ". call api: {task}",
        ". let the model {task}", ". with the <api|model>, {task}",
        ". <request|run> the api: {task}", "! let the api {task}", "!& use the api \"{task}\"",
        "! ask the model: {task}",
    ),
    ("Long Press", "zh"): (
        "& <长按|按住>{at}", ". 长按屏幕上的{at}", ". 长按{at}<的图标|这个位置|处>",
        ". 在{at}<长按|按住不放>", "= 我要长按{at}", ". 长按{x},{y}", "! 按住屏幕上的{at}不放",
        "!& 在{at}长按一下", "! 长按{at}的按钮",
    ),
    ("Long Press", "en"): (
        "& <long press|hold|long tap> {at}", ". long press <on|at> {at}", ". press and hold {at}",
        ". hold the <button|icon> at {at}", ". long press the icon at {at}",
        "= i want to long press {at}", ". long press {x},{y}", "! press and hold the icon at {at}",
        "!& hold on {at}", "! long press the button at {at}",
    ),
    ("Double Tap", "zh"): (
        "& <双击|连点两下|点两下>{at}", ". 双击屏幕上的{at}", ". 双击{at}<的图片|这个位置|处>",
        ". 在{at}<双击|点两下>", "= 我要双击{at}", ". <双击|点两下>{x},{y}",
        "! 点两下屏幕上的{at}", "!& 在{at}连点两下", "! 双击{at}的图标",
    ),
    ("Double Tap", "en"): (
        "& <double tap|double click> {at}", ". <double tap|double click> on {at}",
        ". tap twice <on|at> {at}", ". tap {at} <twice|two times>",
        ". double tap the <picture|icon> at {at}", "= i want to double tap {at}",
        ". double tap {x},{y}", "! double click the picture at {at}", "!& click twice on {at}",
        "! tap the icon at {at} twice",
    ),
    ("Take_over", "zh"): (
        "& <遇到|需要>{hurdle}<时|就>让我接管", ". {hurdle}<让我来|我来|由我来>操作",
        ". {hurdle}请用户接管", ". 需要{hurdle}，<请用户|让我>接管", "= 我来<处理|完成>{hurdle}",
        ". 把{hurdle}交给<我|用户>", ". 让我<手动|自己>{hurdle}", "! 遇到{hurdle}，由我来处理",
        "!& {hurdle}交给我操作", "! 让用户<处理|完成>{hurdle}",
    ),
    ("Take_over", "en"): (
        "& let me take over for {hurdle}", ". let the user <take over|handle> {hurdle}",
        "= i will <do|handle|take over> {hurdle}", ". hand {hurdle} over to <me|the user>",
        "= {hurdle} <is needed|appears>, let me take over", ". leave {hurdle} to <me|the user>",
        ". let me <do|handle> {hurdle}", ". when you see {hurdle}, let me take over",
        "! let the user take over for {hurdle}", "!= i take over when {hurdle} is needed",
        "!& leave {hurdle} for me to do",
    ),
    ("Back", "zh"): (
        "& <返回|退回|回到><上一页|上一级|上个页面>", "& <返回|后退|退回>", ". <返回|后退|退>一下",
        ". 按<返回键|返回>", ". 点<返回键|返回按钮>", ". 退出<当前|这个>页面", ". 回去上一页",
        "! 后退到上一页", "!& 退回到上一级", "! 按一下返回键",
    ),
    ("Back", "en"): (
        "& go back", ". go back to the <last|previous> <page|screen>",
        ". <press|tap> the back <key|button>", ". go one <page|step|screen> back",
        "& return to the <last|previous> page", ". go back <once|one step>", ". leave this page",
        "= back", "! return to the previous screen", "!& press back once", "! go back one page",
    ),
    ("Home", "zh"): (
        "& <返回|回到|退到|回><桌面|主屏幕>", ". <返回|回到>手机<桌面|主屏幕>",
        ". 按<主屏幕键|Home键>", ". 去<桌面|主屏幕>", ". 退出到<桌面|主屏幕>", ". 回<主页面|首屏>",
        "! 退回到桌面", "!& 回手机<桌面|主屏幕>", "! 退出应用回到桌面",
    ),
    ("Home", "en"): (
        "& go <home|to the home screen>", ". <return|go back> to the home screen",
        ". press <home|the home key|the home button>", ". show the <home screen|desktop>",
        ". <go|return> to the desktop", ". back to the home screen", ". take me home",
        "! tap the home button", "!& return home", "! go back to the desktop",
    ),
    ("Wait", "zh"): (
        "& <等待|等|暂停>{n}秒", ". <等待|等>{n}秒钟", ". 先<等|停>{n}秒", ". 停{n}秒再说",
        ". <等|暂停>{n}秒再继续", ". 等页面加载{n}秒", "= 页面没加载完，等{n}秒", ". 休息{n}秒",
        "! 停{n}秒钟", "!& 等待{n}秒再继续", "! 先暂停{n}秒",
    ),
    ("Wait", "en"): (
        "& <wait|pause> {n} seconds", ". <wait|pause> for {n} seconds",
        ". wait {n} seconds for the page", ". give it {n} seconds", ". hold on for {n} seconds",
        ". stop for {n} seconds", "= the page is loading, wait {n} seconds",
        ". wait {n} seconds more", ". sleep <for|> {n} seconds", "! pause {n} seconds for the page",
        "!& stop {n} seconds", "! give the page {n} seconds",
    ),
    ("finish", "zh"): (
        ". <解释|介绍>一下{topic}", "= <请解释|>什么是{topic}", "= {topic}是什么<|意思>",
        ". 解释<什么是|>{topic}", "= <告诉我|说说>{topic}是什么",
        "= 我想<知道|了解><什么是|>{topic}", ". 讲<讲|一下>{topic}", "! 介绍一下什么是{topic}",
        "!= 说一下{topic}是什么意思", "!= 我想知道{topic}是什么",
    ),
    ("finish", "en"): (
        ". explain {topic}", "= what are {topic}?", "= what is {topic}?",
        ". tell me <about|what is> {topic}", "= i want to <know|learn> about {topic}",
        ". explain what is {topic}", ". describe {topic}", "= what do you know about {topic}?",
        "= what does {topic} mean?", ". say something about {topic}",
        ". give me a short text about {topic}", "! explain something about {topic}",
        "!= i want to know what is {topic}", "! describe what {topic} are",
    ),
}

# Small talk: answered by finish with the reply of that name.
SMALL_TALK: dict[tuple[str, str], tuple[str, ...]] = {
    ("greeting", "zh"): ("= <你好|您好|嗨|在吗|早上好|晚上好|下午好>", "= <你好|您好><啊|呀|！|。>",
                         "= 嗨，你好",
                         "!= <早上|下午>好啊"),
    ("greeting", "en"): ("= <hi|hello|hey|good morning|good evening>",
                         "= <hi|hello><!|.| there|, assistant>",
                         "!= <hey there|good morning!>"),
    ("identity", "zh"): ("= 你是谁", "= 你<能|会>做什么", "= 介绍一下你自己", "= 你叫什么<名字|>",
                         "!= 你是什么助手"),
    ("identity", "en"): ("= who are you?", "= what can you do?", "= what is your name?",
                         "= tell me about yourself", "!= tell me who you are"),
    ("thanks", "zh"): ("= <谢谢|多谢|谢谢你|非常感谢><|！>", "!= 多谢你"),
    ("thanks", "en"): ("= <thanks|thank you|thank you very much|thanks a lot><|!>",
                       "!= thanks very much"),
    ("goodbye", "zh"): ("= <再见|拜拜|下次见|明天见><|！>", "!= 拜拜，再见"),
    ("goodbye", "en"): ("= <bye|goodbye|see you|see you later><|!>", "!= bye, see you"),
}
# fmt: on


# Polite words around a sentence, and how the clauses of a longer task are joined.
BEFORE = {
    "zh": ("请", "请帮我", "帮我", "麻烦你", "麻烦", "现在", "你好，请", "请你", "快", "请先"),
    "en": (
        "please ",
        "hey, ",
        "now ",
        "could you ",
        "i want you to ",
        "can you ",
        "quickly ",
        "hello, please ",
    ),
}
AFTER = {
    "zh": ("。", "，谢谢", "，谢谢你", "，快点", "！", "吧"),
    "en": (".", ", please", ", thanks", "!", " now", ", thank you"),
}
JOINS = {
    "zh": (
        "{0}然后{1}",
        "{0}，然后{1}",
        "先{0}，再{1}",
        "先{0}再{1}",
        "{0}，接着{1}",
        "{0}，之后{1}",
        "{0}，{1}",
    ),
    "en": (
        "{0} and then {1}",
        "first {0}, then {1}",
        "{0}, then {1}",
        "{0} and {1}",
        "{0}, after that {1}",
        "{0}; then {1}",
    ),
}
JOINS_HELD_OUT = {"zh": "先{0}，然后{1}", "en": "first {0} and after that {1}"}
JOINS_OF_THREE = {
    "zh": ("{0}，然后{1}，最后{2}", "先{0}，再{1}，最后{2}", "{0}，{1}，{2}"),
    "en": ("{0}, then {1}, and then {2}", "first {0}, then {1}, then {2}", "{0}, {1} and {2}"),
}


@dataclass(frozen=True)
class Pattern:
    """One sentence with slots."""

    kind: str  # the action's name, or "finish"
    language: str  # "zh" or "en"
    text: str  # with {slots}
    clause: bool  # may be a part of a longer task
    bare: bool  # takes no polite words around it
    held_out: bool  # never used in training
    reply: str = ""  # small talk: the name of the reply


def expand(line: str) -> list[str]:
    """Write out every combination of the choices in a grammar line, in reading order."""
    match = _CHOICE.search(line)
    if match is None:
        return [" ".join(line.split(" "))]
    head, tail = line[: match.start()], line[match.end() :]
    return [done for choice in match.group(1).split("|") for done in expand(head + choice + tail)]


def _from_line(line: str, kind: str, language: str, reply: str = "") -> list[Pattern]:
    flags, _, body = line.partition(" ")
    body = body.replace("{at}", _PLACES[language])
    texts = dict.fromkeys(" ".join(text.split()) for text in expand(body))
    return [
        Pattern(kind, language, text, "&" in flags, "=" in flags, "!" in flags, reply)
        for text in texts
    ]


def all_patterns() -> list[Pattern]:
    """List every pattern, held out or not, each text once per kind and language.

    A text that a training line and a held-out line both stand for counts as a training pattern.
    """
    found: list[Pattern] = []
    for (kind, language), lines in GRAMMAR.items():
        for line in lines:
            found += _from_line(line, kind, language)
    for (reply, language), lines in SMALL_TALK.items():
        for line in lines:
            found += _from_line(line, "finish", language, reply)
    training = {(p.kind, p.language, p.text) for p in found if not p.held_out}
    unique: dict[tuple[str, str, str], Pattern] = {}
    for pattern in found:
        key = (pattern.kind, pattern.language, pattern.text)
        if not pattern.held_out or key not in training:
            unique.setdefault(key, pattern)
    return list(unique.values())
