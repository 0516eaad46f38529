"""The words that AutoGLM-tiny is taught with: app names, phrases to type, toy knowledge.

Data and no logic. Every value of a slot (``{app}``, ``{text}``, ...) of a sentence pattern comes
from here, for both languages. Nothing here is taken from a data set.
"""

from __future__ import annotations

# fmt: off
# Word lists stay many to a line.

APPS: dict[str, tuple[str, ...]] = {
    "zh": (
        "微信", "支付宝", "抖音", "淘宝", "京东", "美团", "饿了么", "高德地图", "百度地图",
        "小红书", "微博", "知乎", "哔哩哔哩", "QQ", "网易云音乐", "QQ音乐", "拼多多", "滴滴出行",
        "携程", "去哪儿", "大众点评", "快手", "豆瓣", "腾讯视频", "爱奇艺", "优酷", "今日头条",
        "喜马拉雅", "钉钉", "飞书", "设置", "相机", "日历", "天气", "计算器", "备忘录", "相册",
        "浏览器", "钱包", "铁路出行",
    ),
    "en": (
        "Chrome", "Gmail", "Settings", "WeChat", "YouTube", "WhatsApp", "Telegram", "Instagram",
        "Facebook", "Twitter", "Spotify", "Netflix", "TikTok", "Amazon", "Uber", "Airbnb", "Reddit",
        "LinkedIn", "Zoom", "Slack", "Discord", "Google Maps", "Camera", "Clock", "Calendar",
        "Calculator", "Photos", "Contacts", "Temu", "Booking", "Duolingo", "eBay",
    ),
}

WORDS: dict[str, tuple[str, ...]] = {
    "zh": (
        "火锅", "咖啡", "奶茶", "烤鸭", "面条", "蛋糕", "水果", "外卖", "早餐", "晚饭", "北京",
        "上海", "广州", "深圳", "杭州", "成都", "西安", "机票", "酒店", "火车票", "电影票",
        "天气预报", "新闻", "红色", "蓝色", "黑色", "白色", "外套", "球鞋", "手机", "电脑", "耳机",
        "书包", "小说", "音乐", "视频", "电影", "足球", "篮球", "附近", "便宜", "新款", "今天",
        "明天", "晚上", "周末", "生日快乐", "你好", "再见", "谢谢", "开会", "下班", "回家", "到了",
        "稍等", "收到", "没问题", "学习", "英语", "数学", "公园", "超市", "医院", "学校", "地铁站",
        "机场", "餐厅", "好吃", "好看", "推荐", "攻略",
    ),
    "en": (
        "coffee", "pizza", "noodles", "cake", "fruit", "breakfast", "dinner", "Paris", "London",
        "Tokyo", "Berlin", "Boston", "flight", "hotel", "train", "ticket", "weather", "news", "red",
        "blue", "black", "white", "jacket", "shoes", "phone", "laptop", "headphones", "novel",
        "music", "video", "movie", "football", "basketball", "nearby", "cheap", "new", "today",
        "tomorrow", "tonight", "weekend", "happy", "birthday", "hello", "bye", "thanks", "meeting",
        "home", "later", "wait", "received", "no", "problem", "study", "English", "math", "park",
        "market", "hospital", "school", "station", "airport", "restaurant", "good", "food", "best",
        "guide",
    ),
}

SURNAMES = ("张", "王", "李", "赵", "刘", "陈", "杨", "黄", "周", "吴", "林", "孙")
GIVEN_NAMES = ("伟", "芳", "娜", "敏", "静", "磊", "洋", "艳", "勇", "杰", "小明", "晓红",
               "建国", "雨")
FIRST_NAMES = ("Alice", "Bob", "Carol", "David", "Emma", "Frank", "Grace", "Henry", "Ivy", "Jack",
               "Kate", "Leo", "Mary", "Nick", "Olivia", "Paul")
LAST_NAMES = ("Smith", "Brown", "Lee", "Jones", "Miller", "Davis", "Clark", "Young", "King", "Hill")

# Call_API: an instruction is a verb and an object.
API_VERBS = {
    "zh": ("总结", "翻译", "评论", "分析", "改写", "检查", "整理", "比较"),
    "en": ("summarize", "translate", "comment on", "analyze", "rewrite", "check", "compare",
           "list"),
}
API_OBJECTS = {
    "zh": ("页面内容", "这篇文章", "聊天记录", "商品价格", "用户评价", "这段文字", "搜索结果",
           "视频标题", "订单信息", "新闻标题"),
    "en": ("the page", "this article", "the chat", "the prices", "the reviews", "this text",
           "the search results", "the video title", "the order", "the news"),
}

# A tap with a message: what makes the tap a sensitive one.
RISKS = {
    "zh": ("支付", "付款", "转账", "删除", "下单", "授权", "退款", "注销"),
    "en": ("payment", "transfer", "deletion", "order", "refund", "purchase", "login", "logout"),
}
# Take_over: what a person has to do.
HURDLES = {
    "zh": ("登录", "验证码", "人脸识别", "支付密码", "短信验证", "指纹验证", "滑块验证",
           "实名认证"),
    "en": ("login", "the captcha", "face recognition", "the password", "the text code",
           "the fingerprint", "the slider", "the passcode"),
}

DIRECTIONS: dict[str, dict[str, tuple[int, int, int, int]]] = {
    # Where the finger starts and ends, in thousandths of the screen: x, y, x, y.
    "zh": {"上": (500, 800, 500, 200), "下": (500, 200, 500, 800), "左": (800, 500, 200, 500),
           "右": (200, 500, 800, 500)},
    "en": {"up": (500, 800, 500, 200), "down": (500, 200, 500, 800), "left": (800, 500, 200, 500),
           "right": (200, 500, 800, 500)},
}

TOPICS: dict[str, dict[str, str]] = {
    "zh": {
        "机器学习": "机器学习是让计算机从数据中学习规律的方法。",
        "人工智能": "人工智能是让机器完成需要智能的任务的技术。",
        "深度学习": "深度学习是用多层神经网络学习的方法。",
        "神经网络": "神经网络是由许多相连的节点组成的模型。",
        "大模型": "大模型是参数很多的语言模型。",
        "量化": "量化是用更少的位数保存模型的权重。",
        "光合作用": "光合作用是植物用光制造养分的过程。",
        "引力": "引力是物体之间互相吸引的力。",
        "彩虹": "彩虹是阳光在水滴中折射形成的。",
        "区块链": "区块链是多方共同保存的账本。",
        "云计算": "云计算是通过网络使用远方的计算机。",
        "操作系统": "操作系统是管理手机和电脑的软件。",
    },
    "en": {
        "machine learning": "Machine learning lets computers learn rules from data.",
        "artificial intelligence":
            "Artificial intelligence makes machines do tasks that need thought.",
        "deep learning": "Deep learning learns with neural networks of many layers.",
        "neural networks": "Neural networks are models made of many linked nodes.",
        "language models": "Language models predict the next word of a text.",
        "quantization": "Quantization stores the weights of a model in fewer bits.",
        "photosynthesis": "Photosynthesis is how plants make food from light.",
        "gravity": "Gravity is the force that pulls things together.",
        "rainbows": "Rainbows are sunlight bent by drops of water.",
        "blockchain": "Blockchain is a ledger that many parties keep together.",
        "cloud computing": "Cloud computing uses far computers over a network.",
        "operating systems": "Operating systems manage phones and computers.",
    },
}

REPLIES: dict[str, dict[str, str]] = {
    "zh": {
        "greeting": "你好！请告诉我要在手机上做什么。",
        "identity": "我是手机助手，可以帮你操作手机。",
        "thanks": "不客气！",
        "goodbye": "再见！",
        "done": "任务已完成。",
    },
    "en": {
        "greeting": "Hello! Tell me what to do on the phone.",
        "identity": "I am a phone assistant and can use the phone for you.",
        "thanks": "You are welcome!",
        "goodbye": "Goodbye!",
        "done": "The task is complete.",
    },
}

SYSTEM_SENTENCES: dict[str, tuple[str, ...]] = {
    "zh": (
        "你是一个手机操作助手。", "请根据任务给出下一步操作。", "先思考，再给出一个操作。",
        "坐标从左上角(0,0)到右下角(999,999)。", "每次只能输出一个操作。",
        "如果页面没有加载出来，最多等待三次。", "支付之前需要用户确认。",
        "遇到登录和验证码时请求用户接管。", "找不到目标时可以滑动页面。",
        "任务完成后用finish结束。", "do(action=\"Tap\", element=[x,y])是点击。",
        "do(action=\"Back\")是返回上一页。", "do(action=\"Home\")是回到桌面。",
        "do(action=\"Launch\", app=\"xxx\")是启动应用。", "输入之前先点击输入框。",
        "不要重复没有效果的操作。", "如果进入了无关页面，先返回。", "严格按照用户的要求执行。",
        "检查上一步是否生效。", "回答要简短。",
    ),
    "en": (
        "You are a phone assistant.", "Give the next action for the task.",
        "Think first, then give one action.",
        "Coordinates go from (0,0) at the top left to (999,999) at the bottom right.",
        "Give exactly one action each time.",
        "If the page is not loaded, wait at most three times.",
        "The user must confirm before a payment.", "Ask the user to take over for a login.",
        "Swipe the page when the target is not visible.", "Use finish when the task is complete.",
        "do(action=\"Tap\", element=[x,y]) is a tap.", "do(action=\"Back\") goes to the last page.",
        "do(action=\"Home\") goes to the home screen.",
        "do(action=\"Launch\", app=\"xxx\") opens an app.", "Tap the text box before typing.",
        "Do not repeat an action without effect.", "Go back from a page that does not matter.",
        "Follow the user exactly.", "Check that the last action worked.", "Keep the answer short.",
    ),
}

# The library's own system prompts (`autoglm_gguf.actions.SYSTEM_PROMPT_ZH` and `_EN`).
_ACTION_LIST = """do(action="Launch", app="…")
do(action="Tap", element=[x,y])
do(action="Tap", element=[x,y], message="…")
do(action="Type", text="…")
do(action="Type_Name", text="…")
do(action="Interact")
do(action="Swipe", start=[x1,y1], end=[x2,y2])
do(action="Note", message="True")
do(action="Call_API", instruction="…")
do(action="Long Press", element=[x,y])
do(action="Double Tap", element=[x,y])
do(action="Take_over", message="…")
do(action="Back")
do(action="Home")
do(action="Wait", duration="x seconds")
finish(message="…")"""
ACTION_PROMPTS = {
    "zh": "你是手机操作助手。先在<think>里简短思考，再在<answer>里给出一个操作，"
    "坐标范围是0到999：\n"
    + _ACTION_LIST,
    "en": "You operate a phone. Think briefly in <think>, then give one action in <answer>; "
    "coordinates run from 0 to 999:\n" + _ACTION_LIST,
}

WEEKDAYS = {
    "zh": ("星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日"),
    "en": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
}

HOME_SCREENS = ("System Home", "桌面", "主屏幕", "Home Screen")

# Chinese words that the tokenizer learns whole, besides the values of the slots.
LEXICON_ZH = (
    "打开", "启动", "进入", "运行", "应用", "软件", "手机", "一下", "帮我", "麻烦", "请", "现在",
    "可以", "能不能", "切换到", "跳转到", "看看", "点击", "轻触", "点按", "坐标", "位置", "屏幕",
    "按钮", "输入", "输入框", "搜索框", "文字", "内容", "填写", "姓名", "名字", "联系人", "滑动",
    "滑到", "拖动", "页面", "记录", "记下", "调用", "接口", "长按", "双击", "连点", "接管", "用户",
    "返回", "上一页", "后退", "桌面", "主屏幕", "等待", "等", "秒", "然后", "接着", "之后", "最后",
    "再", "先", "选择", "选项", "问我", "确认", "什么是", "解释", "介绍", "告诉", "任务", "完成",
    "操作", "需要", "助手", "今天的日期是", "年", "月", "日", "重要", "停留", "快速", "从", "到",
    "里", "多个", "决定", "手动", "处理", "使用", "退回", "信息", "保存",
)
